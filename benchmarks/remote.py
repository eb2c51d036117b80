"""Push and pull against raw obstore put and get of the same bytes, and fits from a warm cache against fits from disk.

Each ratio is of two times taken in turns in the same run, the best of each, with moto's S3 on loopback as the bucket and
with a folder: `python benchmarks/remote.py` for a store of the toy model of 230 MB (35 s of processor with one round), or
`python benchmarks/remote.py --stores DIR STORE`. moto is one Python process and shares the CPU with the client, so on S3 both
sides of a ratio are mostly its time; the folder shows what verification, fsync and records cost by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # tests/ alone would hide the package behind tests/actstore

import obstore  # noqa: E402
from bucket_server import s3_server, set_environment  # noqa: E402

from actstore import Cache, CaptureRequest, Store, capture, open_store  # noqa: E402
from actstore.bucket import open_bucket  # noqa: E402
from actstore.remote import WORKERS, pull, push  # noqa: E402
from trainer import FitConfig, fit  # noqa: E402


def toy_store(work: Path) -> Store:
    """Capture 55,000 rows of 1,024 dimensions in 7 row groups; the toy model costs nothing."""
    corpus = work / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i} {'the quick brown fox ' * 100}"}) + "\n" for i in range(30)))
    request = CaptureRequest(
        model="toy:1024", hooks=("hook_embed",), corpus=(corpus,), rows=55_000, backend="toy", stores=work / "stores"
    )  # fmt: skip
    return open_store(capture(request)[0], work / "stores")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio(name: str, raw: Callable[[int], object], ours: Callable[[int], object], rounds: int, n_bytes: int) -> None:
    times = [(seconds(lambda i=i: raw(i)), seconds(lambda i=i: ours(i))) for i in range(rounds)]
    a, b = min(t for t, _ in times), min(t for _, t in times)
    print(f"| {name} | {n_bytes / a / 1e6:.0f} MB/s | {n_bytes / b / 1e6:.0f} MB/s | {a / b:.3f} |", flush=True)


def moving(url: str, store: Store, rounds: int, work: Path) -> None:
    files = {str(p.relative_to(store.path)): p for p in store.path.rglob("*") if p.is_file()}
    n_bytes = sum(p.stat().st_size for p in files.values())
    kind = url.partition(":")[0]

    def raw_put(i: int) -> None:
        bucket = open_bucket(f"{url}/raw{i}", make=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda name: obstore.put(bucket._store, name, files[name].read_bytes(), use_multipart=False), files))

    def raw_get(i: int) -> None:
        bucket = open_bucket(f"{url}/raw0")
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda name: len(obstore.get(bucket._store, name).bytes()), files))

    def raw_get_and_save(i: int) -> None:
        bucket, folder = open_bucket(f"{url}/raw0"), work / f"saved{i}"

        def save(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as file:
                file.write(obstore.get(bucket._store, name).bytes())
                os.fsync(file.fileno())

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(save, files))
        shutil.rmtree(folder)

    def pulled(i: int) -> None:
        pull(open_bucket(f"{url}/ours0"), store.digest, work / f"pulled{i}")
        shutil.rmtree(work / f"pulled{i}")

    ratio(f"push, {kind}", raw_put, lambda i: push(store, open_bucket(f"{url}/ours{i}", make=True)), rounds, n_bytes)
    ratio(f"pull, {kind}, against get", raw_get, pulled, rounds, n_bytes)
    ratio(f"pull, {kind}, against get, write, fsync", raw_get_and_save, pulled, rounds, n_bytes)


def fitting(url: str, store: Store, rounds: int, work: Path) -> None:
    config = lambda i: FitConfig(n_latents=(256,), k=(8,), shuffle="chunks", seed=(i,), rows=20_000)  # noqa: E731
    with contextlib.closing(Cache(work / "cache")) as cache:
        there = cache.open(f"{url}/ours0#{store.digest}")
        first = seconds(lambda: fit(there, config(99), work / "runs"))
        ratio(
            f"fit from a warm cache (cold: {first:.1f} s)",
            lambda i: fit(store, config(i), work / "runs"),
            lambda i: fit(there, config(i + 10), work / "runs"),
            rounds,
            store.bytes,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", nargs="?")
    parser.add_argument("--stores", default="stores")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", help="folder on the disk that is measured; a temporary one by default")
    args = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's line for every request
    print("| | raw | actstore | ratio |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder, s3_server("bucket") as target:
        set_environment(f"http://{target}", os.environ.__setitem__, os.environ.__delitem__)
        work = Path(folder)
        store = open_store(args.store, args.stores) if args.store else toy_store(work)
        moving(f"file://{work}/bucket", store, args.rounds, work)
        fitting(f"file://{work}/bucket", store, args.rounds, work)
        moving("s3://bucket/x", store, args.rounds, work)


if __name__ == "__main__":
    main()
