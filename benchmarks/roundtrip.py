"""What each stored dtype costs and keeps, on real activations: one capture a dtype of the same rows, then compared.

usage: python benchmarks/roundtrip.py [--model FOLDER --hook HOOK --corpus FILE --rows N --seq-len N]...

Without arguments the embedded model on this repository's own text. The model computes in float32 each time, so the
float32 store is what the others are compared with. Printed: bytes of `acts` and what else undoes it against float32,
squared error of a row over the total variance of the ordinary rows (norm at most 10 medians), and how many rows an
int8 store keeps exact.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from actstore import ActstoreError, CaptureRequest, Store, capture, open_store
from actstore.describe import exact_rows
from actstore.layout import arrays_of, chunk_name

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "float16", "bfloat16", "int8")


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "data" / "tiny-gpt2"))
    parser.add_argument("--hook", default="blocks.2.hook_resid_pre")
    parser.add_argument("--corpus", nargs="+", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "actstore").glob("*.py"))])
    parser.add_argument("--rows", type=int, default=16_384, help="a power of two leaves the last row group without padding")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--max-documents", type=int)
    return parser.parse_args()


def bytes_of_rows(store: Store) -> int:
    """Return the bytes of the chunk files that hold activations: `acts`, and what undoes it."""
    arrays = set(arrays_of(store.dtype)) - {"tokens", "documents", "positions"}
    groups = range(len(store.manifest.groups))
    return sum((store.path / chunk_name(a, g)).stat().st_size for a in arrays for g in groups)


def main() -> None:
    """Capture, compare, print one table."""
    options, stores, seconds = arguments(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = []
        for path in options.corpus:  # plain text of any ending is one document a file
            known = path.suffix in (".jsonl", ".txt", ".parquet", ".gz")
            corpus.append(path if known else Path(folder) / f"{path.name}.txt")
            if not known:
                corpus[-1].write_text(path.read_text())
        for dtype in DTYPES:
            start = time.perf_counter()
            request = CaptureRequest(
                model=options.model, hooks=(options.hook,), corpus=tuple(corpus), seq_len=options.seq_len, rows=options.rows,
                max_documents=options.max_documents, dtype=dtype, compute_dtype="float32", stores=Path(folder),
            )  # fmt: skip
            try:
                stores[dtype] = open_store(capture(request)[0], Path(folder))
            except ActstoreError as error:  # float16 does not hold every model
                print(f"{dtype}: {error}")
            seconds[dtype] = time.perf_counter() - start
        report(stores, seconds)


def report(stores: dict[str, Store], seconds: dict[str, float]) -> None:
    """Print the table."""
    x = stores["float32"][:].astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    massive = norms > 10 * np.median(norms)
    variance = x[~massive].var(axis=0).sum()
    print(f"{len(x)} rows x {x.shape[1]}; median norm {np.median(norms):.4g}, largest {norms.max():.4g}, {massive.sum()} massive")
    print("| dtype | smaller | error/variance: median | p99 | max | massive rows, max | exact rows | capture |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype, store in stores.items():
        error = np.square(store[:].astype(np.float64) - x).sum(axis=1) / variance
        smaller = bytes_of_rows(stores["float32"]) / bytes_of_rows(store)
        of_massive = f"{error[massive].max():.1e}" if massive.any() else "none"
        kept = exact_rows(store)
        print(
            f"| {dtype} | {smaller:.2f}x | {np.median(error):.1e} | {np.quantile(error, 0.99):.1e} | {error.max():.1e} "
            f"| {of_massive} | {'' if kept is None else kept} | {seconds[dtype]:.0f} s |"
        )


if __name__ == "__main__":
    main()
