"""What the peers share: rows from a file, a few warm steps, the median of the rest, one line of JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import numpy as np
import torch


def arguments() -> tuple[list[torch.Tensor], int, int]:
    """Return the batches of the rows file, n_latents and k."""
    rows, n, k, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    return list(torch.from_numpy(np.load(rows)).split(batch)), n, k


def report(step: Callable[[int, torch.Tensor], object], batches: list[torch.Tensor], seconds: float = 8.0) -> None:
    """Time a step and print tokens per second."""
    start = time.perf_counter()
    step(0, batches[0])
    times = []
    for i in range(1, 60):
        if i > 4 and time.perf_counter() - start > seconds:
            break
        begun = time.perf_counter()
        step(i, batches[i % len(batches)])
        times.append(time.perf_counter() - begun)
    print(json.dumps({"tokens_per_s": len(batches[0]) / statistics.median(times[1:]), "steps": len(times)}))
