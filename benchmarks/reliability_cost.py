"""What safety costs: fsync as a share of a capture, and verification at first touch as a share of a fit.

    python benchmarks/reliability_cost.py                                   # the embedded model and corpus
    python benchmarks/reliability_cost.py --model DIR --hook blocks.15.hook_resid_pre --corpus FILE --rows 100000
    python benchmarks/reliability_cost.py --store 55c29 --stores DIR --n-latents 4608              # only a fit

Every call of os.fsync is timed in place. It happens in the writer's thread while the model computes, so its share of
the wall time is an upper bound of what it adds. Verification is timed around each first touch of a chunk. Nearly all of
that is the disk: the pages it reads are those the fit reads next, from the page cache then. So both are printed: the
first touch as a whole, and what is left of it without its `os.pread`, which is what verification adds.
The target is 5 % of a capture and 2 % of a fit (reliability.md, section 8).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actstore import reader
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from trainer import FitConfig, fit

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def timed_calls(owner: Any, name: str) -> Iterator[list[float]]:
    """Yield the seconds of each call of `owner.name` made inside the block."""
    original: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, original)


def measure_capture(request: CaptureRequest) -> str:
    """Capture, print the share of fsync, and return the store's digest."""
    start = time.perf_counter()
    with timed_calls(os, "fsync") as syncs:
        (digest,) = capture(request)
    wall = time.perf_counter() - start
    share = 100 * sum(syncs) / wall
    print(f"capture: {request.rows} rows in {wall:.1f} s; {len(syncs)} fsyncs took {sum(syncs):.2f} s: {share:.2f} %")
    return digest


def measure_fit(store: reader.Store, n_latents: int, runs: Path) -> None:
    """Train one SAE for one epoch from a cold cache and print the share of first touches."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    start = time.perf_counter()
    with timed_calls(reader.Store, "_map") as touches, timed_calls(os, "pread") as reads:
        fit(store, FitConfig(n_latents=(n_latents,), k=(32,), epochs=1.0), runs)
    wall = time.perf_counter() - start
    touched, added = sum(touches), sum(touches) - sum(reads)
    cache = "cold" if os.geteuid() == 0 else "warm"
    print(f"fit: one epoch of {store.rows} rows of {store.d_model}, one SAE of {n_latents} latents, {cache} cache, {wall:.1f} s")
    print(f"  {len(touches)} first touches took {touched:.2f} s: {100 * touched / wall:.2f} %")
    print(f"  without reading the disk {added:.2f} s: {100 * added / wall:.2f} %")


def main() -> None:
    """Measure both shares and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "data" / "tiny-gpt2"))
    parser.add_argument("--hook", default="blocks.2.hook_resid_pre")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "corpus" / "stdlib.jsonl")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where the store is written: the disk to be measured")
    parser.add_argument("--store", help="do not capture, train from this store")
    parser.add_argument("--stores", type=Path, help="the folder of --store")
    parser.add_argument("--n-latents", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        home = Path(name)
        if options.store:
            store = open_store(options.store, options.stores)
        else:
            request = CaptureRequest(
                model=options.model, hooks=(options.hook,), corpus=(options.corpus,), rows=options.rows, stores=home / "stores"
            )
            store = open_store(measure_capture(request), request.stores)
        measure_fit(store, options.n_latents, home / "runs")


if __name__ == "__main__":
    main()
