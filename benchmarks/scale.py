"""What happens as stores and captures grow: manifests of up to a million row groups, workers on one store.

    python benchmarks/scale.py --manifest 1000 10000 100000 1000000    # open, check, plan and sample; time and memory
    python benchmarks/scale.py --manifest 1000 10000 --listed          # the same with the digests listed in the manifest
    python benchmarks/scale.py --workers                               # 1 process of 2 threads against 2 of 1
    python benchmarks/scale.py --kills 30                              # 12 workers, killed at random, one content digest
    python benchmarks/scale.py --kills 30 --stores s3://bucket/prefix  # the same in a bucket, some put to sleep instead
    python benchmarks/scale.py --records 400                           # what resuming and sealing cost a row group
    python benchmarks/scale.py --order                                 # how well windows mix stores of 10^9 to 10^12 rows

A manifest is that of a store of Llama-3.1-8B's width, 4,096 bfloat16 coordinates, 4,096 rows a row group. Its digests
are those of row groups of zeros, really made, checked and sealed by the library. The few row groups that are read have
their chunk files and records, as holes in files; the others have none, which opening a store of format 2 must not need.
Each size is opened in a process of its own, so that its peak of resident memory is its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actstore import bucket_writer, durable, manifest, seal
from actstore.bucket import open_bucket
from actstore.capture import CaptureRequest, Progress, capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.digests import sha256_bytes
from actstore.key import HubCorpus, ModelIdentity, SequenceRule, StoreKey
from actstore.layout import GROUPS, MANIFEST, StorePaths, arrays_of, chunk_name, record_name
from actstore.manifest import RowGroup, dump_record, group_digest, seal_manifest
from actstore.reader import open_folder, open_unchecked
from actstore.remote import pull
from actstore.stats import dump_moments, moments_of
from actstore.writer import StoreWriter, read_groups
from actstore.zarr_array import chunk_shape, encode_chunk, numpy_dtype
from trainer.config import FitConfig, resolve
from trainer.order import companions, make_order

ROOT = Path(__file__).parent.parent
D_MODEL, DTYPE, GROUP_ROWS = 4096, "bfloat16", 4096
READ_GROUPS = 2  # of the stores made here, those that have files


def key_of(rows: int) -> StoreKey:
    """Return the key of a store that nobody captured."""
    return StoreKey(
        backend="transformers", attention="sdpa", center=False, compute_dtype="bfloat16", hook="blocks.16.hook_resid_pre",
        model=ModelIdentity(source="hub", name="meta-llama/Llama-3.1-8B", revision="0" * 40), tokenizer="0" * 64,
        corpus=HubCorpus(dataset="HuggingFaceFW/fineweb", split="train", revision="0" * 40), dtype=DTYPE, rows=rows,
        text_field="text", bad_lines="error", sequences=SequenceRule(packing="pack", seq_len=1024, bos=True),
    )  # fmt: skip


def make_store(stores: Path, n_groups: int, with_files: int = READ_GROUPS) -> Path:
    """Make a sealed store of `n_groups` row groups of zeros, the first `with_files` with files; return its folder."""
    key = key_of(n_groups * GROUP_ROWS)
    paths = StorePaths(stores, sha256_bytes(manifest.canonical_json(key.model_dump())))
    files: dict[str, list[memoryview]] = {}
    chunks = {}
    for array in arrays_of(DTYPE):
        rows = np.zeros(chunk_shape(array, GROUP_ROWS, D_MODEL), numpy_dtype(array, DTYPE))
        files[array], chunks[array] = encode_chunk(rows, GROUP_ROWS)
    moments = moments_of(np.zeros((GROUP_ROWS, D_MODEL), np.float32))
    record = RowGroup.model_validate(
        {"store": paths.digest, "index": 0, "rows": GROUP_ROWS, "chunks": chunks, "statistics": dump_moments(moments)}
    )
    # Only the index differs from one identity to the next.
    before, after = manifest.canonical_json(
        record.model_copy(update={"index": 123456789}).model_dump(include={"store", "index", "rows", "chunks"})
    ).split(b"123456789")
    groups = [sha256_bytes(b"%s%d%s" % (before, index, after)) for index in range(n_groups)]
    assert groups[1] == group_digest(record.model_copy(update={"index": 1}))
    whole = dataclasses.replace(moments, rows=key.rows, norms={k: n * n_groups for k, n in (moments.norms or {}).items()})
    sealed = seal_manifest(key, n_groups * GROUP_ROWS, D_MODEL, groups, {}, whole, {})
    small = seal.small_files(sealed, whole, {"tokens": ["a"], "special": []})
    sealed = sealed.model_copy(update={"files": {name: sha256_bytes(data) for name, data in small.items()}})
    for folder in (*arrays_of(DTYPE), "row_groups"):
        durable.make_dir(paths.sealed / folder)
    for name, data in {**small, MANIFEST: dump_record(sealed)}.items():
        durable.write_new(paths.sealed, name, [data])
    eager = sealed.format == 1 and n_groups <= 10_000  # opening format 1 looks at every file's size; else only parse it
    for index in range(n_groups if eager else with_files):
        for array, buffers in files.items():
            path, size = paths.sealed / chunk_name(array, index), sum(b.nbytes for b in buffers)
            with open(path, "wb") as file:
                os.truncate(file.fileno(), size)
                os.pwrite(file.fileno(), bytes(buffers[-1]), size - buffers[-1].nbytes)
                if array != "acts":
                    os.pwrite(file.fileno(), b"".join(map(bytes, buffers)), 0)
        if index < with_files:
            (paths.sealed / record_name(index)).write_bytes(dump_record(record.model_copy(update={"index": index})))
    durable.remove_tree(paths.sealed / "tmp")
    return paths.sealed


def peak_mib() -> float:
    """Return this process's peak of resident memory. (getrusage would count the parent's before exec.)"""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line) / 1024


def resident_mib() -> float:
    """Return this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, and what it returned."""
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


def look(folder: Path) -> dict[str, Any]:
    """Open a store in this process; plan an epoch and sample its first window; return seconds and MiB of each."""
    began = peak_mib()  # with torch, which this file imports
    whole = (folder / chunk_name("tokens", len(open_unchecked(folder).manifest.groups) - 1)).exists()
    tabled = (folder / GROUPS).exists()
    open_s, store = timed(lambda: open_folder(folder) if whole or tabled else open_unchecked(folder))
    open_mib = peak_mib()
    first_s, _ = timed(lambda: store[GROUP_ROWS - 2 : GROUP_ROWS + 2])
    describe_s, size = timed(lambda: store.bytes)
    order = make_order(
        store.rows, store.d_model * 2, resolve(FitConfig(), store.d_model, store.rows)[0], store.manifest.group_rows
    )
    order.rows_of_window(1, 0)  # numba's compilation
    window_s, rows = timed(lambda: order.rows_of_window(0, 0))
    assert len(np.unique(rows)) == len(rows) == min(order.window_rows, store.rows) and 0 <= rows.min() <= rows.max() < store.rows
    return {
        "row groups": len(store.manifest.groups), "rows": store.rows, "TB": size / 1e12, "format": store.manifest.format,
        "manifest MB": sum(p.stat().st_size for p in (folder / MANIFEST, folder / GROUPS) if p.exists()) / 1e6,
        "open s": open_s, "open MiB": open_mib, "of these before": began, "first rows s": first_s, "size s": describe_s,
        "window s": window_s, "chunks of a window": len(np.unique(rows // GROUP_ROWS)),
    }  # fmt: skip


def manifests(sizes: list[int], listed: bool, folder: Path) -> None:
    """Make a store of each size and look at it in a process of its own."""
    if listed:
        manifest.MAX_LISTED_GROUPS = max(sizes)
    for n_groups in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as home:
            make_s, path = timed(lambda home=home, n=n_groups: make_store(Path(home), n))
            done = subprocess.run([sys.executable, __file__, "--look", str(path)], capture_output=True, text=True, check=False)
            said = json.loads(done.stdout) if done.returncode == 0 else {"row groups": n_groups, "failed": done.stderr[-300:]}
            print_line({**said, "made and sealed s": make_s})


def request_of(stores: Path | str, options: argparse.Namespace, rank: int, workers: int) -> CaptureRequest:
    """Return one worker's request."""
    return CaptureRequest(
        model=str(options.model), hooks=(options.hook,), corpus=(options.corpus,), rows=options.rows, stores=stores,
        workers=workers, rank=rank,
    )  # fmt: skip


def work(stores: Path, options: argparse.Namespace, rank: int, workers: int) -> None:
    """Capture as one worker and print when it began to fill row groups, when it ended, and how long it waited for others."""
    began: list[float] = []
    manifest.MAX_CHUNK_BYTES = 1  # row groups of 1,024 rows, the fewest: a short run has as many as a long one of full size
    progress = Progress(on_corpus=lambda report: began.extend((time.time(), time.process_time())))
    capture(request_of(stores, options, rank, workers), progress)
    seconds = progress.timeline.shares().get("wait", 0.0) * (time.perf_counter() - progress.timeline.start)
    used = time.process_time() - began[1]
    print_line({"began": repr(began[0]), "ended": repr(time.time()), "waited s": seconds, "cpu s": used})


def workers_against_one(options: argparse.Namespace) -> None:
    """Compare one process of two threads, two workers of one, and one process of one, by turns.

    Rows a second count from the first batch to the seal. Rows a CPU second are what other people's load hardly changes:
    two workers against one process of one thread shows what coordination costs.
    """
    kinds = {"1 x 2 threads": (1, 2), "2 x 1 thread": (2, 1), "1 x 1 thread": (1, 1)}
    found: dict[str, dict[str, list[float]]] = {kind: {"rows/s": [], "rows/CPU s": []} for kind in kinds}
    same = ["--model", options.model, "--hook", options.hook, "--corpus", options.corpus, "--rows", options.rows]
    for kind, (n, threads) in list(kinds.items()) * options.repeat:
        with tempfile.TemporaryDirectory(dir=options.folder) as home:
            start = time.time()
            children = [
                subprocess.Popen(
                    [sys.executable, __file__, "--work", home, "--rank", str(rank), "--of", str(n), *map(str, same)],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True,
                )
                for rank in range(n)
            ]  # fmt: skip
            said = [json.loads(child.communicate()[0]) for child in children]
            first, last = min(float(s["began"]) for s in said), max(float(s["ended"]) for s in said)
            found[kind]["rows/s"].append(options.rows / (last - first))
            found[kind]["rows/CPU s"].append(options.rows / sum(s["cpu s"] for s in said))
            (line,) = list_stores(Path(home))
            now = {name: values[-1] for name, values in found[kind].items()}
            waited = str([s["waited s"] for s in said])
            load = os.getloadavg()[0]
            print_line(
                {"kind": kind, **now, "start-up s": first - start, "waited s": waited, "sealed": line.sealed, "load": load}
            )
    for name in ("rows/s", "rows/CPU s"):
        print_line({"median": name, **{kind: float(np.median(values[name])) for kind, values in found.items()}})


def kills(options: argparse.Namespace, workers: int = 12) -> None:
    """Capture once in peace, then with a dozen workers that are killed at random and started again; compare the digests."""
    import torch
    import transformers  # noqa: F401 - once, for all children; nothing is computed in this process

    torch.set_num_threads(1)
    manifest.MAX_CHUNK_BYTES = 1  # row groups of 1,024 rows, the fewest
    bucket_writer.LEASE_SECONDS = 2.0
    rng = random.Random(options.seed)

    def start(stores: Path | str, rank: int, of: int) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                capture(request_of(stores, options, rank, of))
                status = 0
            finally:
                os._exit(status)
        return child

    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        alone, here = Path(home) / "alone", Path(home) / "together"
        together = f"{options.stores}/{secrets.token_hex(4)}" if options.stores else here
        assert os.waitpid(start(alone, 0, 1), 0)[1] == 0
        (line,) = list_stores(alone)
        began, killed, ended, slept, asleep = time.time(), 0, 0, 0, {}
        running = {start(together, rank, workers): rank for rank in range(workers)}
        while running:
            time.sleep(rng.uniform(0, 0.3))
            if killed < options.kills and running:
                victim = rng.choice(sorted(running))
                if options.stores and victim not in asleep and rng.random() < 0.5:
                    os.kill(victim, signal.SIGSTOP)
                    slept, asleep[victim] = slept + 1, time.time() + rng.uniform(0, 6)  # up to three leases
                else:
                    os.kill(victim, signal.SIGKILL)
            for child in [child for child, until in asleep.items() if child not in running or time.time() > until]:
                del asleep[child]
                if child in running:
                    os.kill(child, signal.SIGCONT)
            for child in list(running):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    rank = running.pop(child)
                    if status:
                        killed += os.WIFSIGNALED(status)
                        assert os.WIFSIGNALED(status), f"worker {rank} ended with {status}"
                        running[start(together, rank, workers)] = rank
                    else:
                        ended += 1
        if options.stores:
            pull(open_bucket(together), line.digest, here)
        store = open_store(line.digest, here)
        same = store.content_digest == open_store(line.digest, alone).content_digest
        print_line(
            {
                "workers": workers, "killed": killed, "put to sleep": slept, "finished": ended,
                "row groups": len(store.manifest.groups),
                "same content digest": same, "findings": len(check_store(store.path, data=True).findings),
                "s": time.time() - began,
            }
        )  # fmt: skip
        assert same


def records(n_groups: int, folder: Path | None) -> None:
    """Print what a worker that comes late, or seals, spends on each committed row group: seconds, and memory it keeps."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        path = make_store(Path(home), n_groups, n_groups)
        paths = StorePaths(Path(home), path.name)
        durable.make_dir(paths.staging.parent)
        durable.rename_dir(path, paths.staging)
        writer = StoreWriter(paths, key_of(n_groups * GROUP_ROWS), n_groups * GROUP_ROWS, D_MODEL)
        before = resident_mib()
        look_s, _ = timed(writer.look_again)
        kept, before = resident_mib() - before, resident_mib()
        assert not writer.missing_row_groups()
        seal_s, _ = timed(lambda: read_groups(writer))
        whole = [writer.read_committed(i) for i in range(n_groups)]
        print_line(
            {
                "records": len(whole), "kB each": (paths.staging / record_name(0)).stat().st_size / 1e3,
                "ms each, to resume": 1e3 * look_s / n_groups, "ms each, to seal": 1e3 * seal_s / n_groups,
                "kB kept each": 1024 * kept / n_groups, "kB if records were kept": 1024 * (resident_mib() - before) / n_groups,
            }
        )  # fmt: skip


def orders() -> None:
    """Print how an epoch's first window is made, and how well it mixes, of stores too large to make."""
    for d_model in (4096, 16384):
        for rows in (10**9, 10**10, 10**11, 10**12):
            order = make_order(rows, d_model * 2, resolve(FitConfig(), d_model, rows)[0], 8192)
            order.rows_of_window(1, 0)
            window_s, first = timed(lambda order=order: order.rows_of_window(0, 0))
            last_s, last = timed(lambda order=order: order.rows_of_window(0, order.n_windows - 1))
            for found in (first, last):
                assert len(np.unique(found)) == len(found) and 0 <= found.min() <= found.max() < rows
            group_rows = manifest.rows_per_group(d_model, "bfloat16", rows)
            here, ideal = companions(order, 4096, 1000)
            print_line(
                {
                    "d_model": d_model, "rows": rows, "row groups": -(-rows // group_rows), "rows of a block": order.block,
                    "rows of a window": order.window_rows, "chunks of a window": len(np.unique(first // group_rows)),
                    "first window s": window_s, "last window s": last_s, "companions in a batch": here, "ideal": ideal,
                }
            )  # fmt: skip


def print_line(values: dict[str, Any]) -> None:
    """Print one result as a line of JSON, numbers to four digits."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def main() -> None:
    """Run what was asked for and print a JSON object a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--manifest", type=int, nargs="+", help="row groups of the stores to make and open")
    parser.add_argument("--listed", action="store_true", help="list the digests in the manifest whatever their number (format 1)")
    parser.add_argument("--folder", type=Path, help="where stores are made: the disk to be measured")
    parser.add_argument("--workers", action="store_true", help="compare one process of two threads with two of one")
    parser.add_argument("--repeat", type=int, default=3, help="times that each is run")
    parser.add_argument("--kills", type=int, help="how often one of 12 workers is killed")
    parser.add_argument("--stores", help="URL of a bucket that they fill, instead of a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=int, help="row groups whose commit records are read, as by a worker that comes late")
    parser.add_argument("--order", action="store_true", help="the first and last window of 10^9 to 10^12 rows")
    parser.add_argument("--model", default=str(ROOT / "data" / "tiny-gpt2"))
    parser.add_argument("--hook", default="blocks.2.hook_resid_pre")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "corpus" / "stdlib.jsonl")
    parser.add_argument("--rows", type=int, default=40_000)
    for name, kind in (("--look", Path), ("--work", Path), ("--rank", int), ("--of", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        print_line(look(options.look))
    if options.work:
        work(options.work, options, options.rank, options.of)
    if options.workers:
        workers_against_one(options)
    if options.kills:
        kills(options)
    if options.records:
        records(options.records, options.folder)
    if options.order:
        orders()
    if options.manifest:
        manifests(options.manifest, options.listed, options.folder)


if __name__ == "__main__":
    main()
