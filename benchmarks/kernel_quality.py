"""Whether kernels and precisions train equally good SAEs: held-out FVU of the same fits, several seeds.

    python benchmarks/kernel_quality.py STORES HASH --rows 200000 --n-latents 2048 --k 32

Every fit has the same rows in the same order; the reference kernel is plain autograd.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from actstore.catalog import open_store
from trainer import FitConfig, fit

WAYS = {
    "reference": ("reference", "float32"), "fast": ("fast", "float32"), "sparse": ("sparse", "float32"),
    "bfloat16": ("auto", "bfloat16"),
}  # fmt: skip


def main() -> None:
    """Fit and print one line a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path)
    parser.add_argument("hash")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--skip-positions", type=int, default=1, help="massive rows at position 0 would hide everything")
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    store = open_store(options.hash, options.stores)
    first: list[float] = []
    for way in options.ways.split(","):
        kernel, precision = WAYS[way]
        config = FitConfig(
            n_latents=(options.n_latents,), k=(options.k,), seed=(0, 1, 2), rows=options.rows, batch_size=options.batch_size,
            skip_positions=options.skip_positions, holdout=0.1, precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as runs:
            start = time.perf_counter()
            results = fit(store, config, runs, kernel=kernel)
            seconds = time.perf_counter() - start
        fvu = [r.metrics["held_out"]["fvu"] for r in results]
        first = first or fvu
        apart = [a / b - 1 for a, b in zip(fvu, first, strict=True)]
        dead = statistics.mean(r.metrics["dead_fraction"] for r in results)
        print(
            f"{way}: held-out FVU {', '.join(f'{v:.5f}' for v in fvu)} ({', '.join(f'{a:+.3%}' for a in apart)} of the first), "
            f"dead {dead:.2%}, {seconds:.0f} s for three"
        )


if __name__ == "__main__":
    main()
