"""What feeding from a store costs: rows/s of a fit's steps against the same steps on one batch in memory.

    python benchmarks/from_store.py STORES HASH --n-latents 2048 --epochs 1

For a store larger than the free page cache, run it in a memory cgroup (`systemd-run --scope -p MemoryMax=2500M …`).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from actstore.catalog import open_store
from trainer import FitConfig
from trainer.batches import Batches, split_rows
from trainer.checkpoint import create_run
from trainer.config import resolve
from trainer.fit import squared_distance
from trainer.member import open_member, train_step
from trainer.order import make_order
from trainer.sae import Batch
from trainer.sources import Sources

from train import unscaled  # isort: skip


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path)
    parser.add_argument("hash")
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    store, device = open_store(options.hash, options.stores), torch.device("cpu")
    config = FitConfig(n_latents=(options.n_latents,), batch_size=options.batch_size, epochs=options.epochs)
    split = split_rows(store, config)
    (sae,) = resolve(config, store.d_model, split.n_train)
    sources = Sources((store,))
    order = make_order(split.n_train, sources.row_bytes, sae, sources.chunk_rows)
    batches = Batches(sources, split, order, options.batch_size)
    centre = torch.zeros(store.d_model)
    with tempfile.TemporaryDirectory() as runs:
        member = open_member(
            create_run(Path(runs), sae, batches.sources), unscaled(torch.zeros(2, store.d_model)), device, "fast"
        )
        times, kept, rows = [], None, 0
        start = before = time.perf_counter()
        for (batch,) in batches.iterate(0, sae.rows, device, [0.01]):
            train_step(member, Batch(batch, batch), squared_distance(batch, centre))
            now = time.perf_counter()
            times.append(now - before)
            before, rows = now, rows + len(batch)
            kept = batch.clone() if kept is None else kept
        fed = rows / (time.perf_counter() - start)
        assert kept is not None
        memory = []
        for _ in range(max(8, min(40, len(times) // 3))):
            before = time.perf_counter()
            train_step(member, Batch(kept, kept), squared_distance(kept, centre))
            memory.append(time.perf_counter() - before)
    middle = sorted(times)[len(times) // 2], sorted(memory)[len(memory) // 2]
    found = {
        "rows_per_s": round(fed), "in_memory_rows_per_s": round(len(kept) / middle[1]),
        "ratio": round(fed * middle[1] / len(kept), 3), "ratio_of_medians": round(middle[1] / middle[0], 3),
        "first_batch_s": round(times[0], 2), "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
