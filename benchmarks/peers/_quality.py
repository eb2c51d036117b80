"""What the peers of quality.py share: the same rows in the same order, and what is handed back."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import torch

JOB: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].startswith("{") else {}
DEVICE = torch.device(JOB.get("device", "cpu"))
FOLDER = Path(JOB.get("folder", "."))
N, K, ROWS, BATCH = (int(JOB.get(name, 0)) for name in ("n", "k", "rows", "batch_size"))
STEPS = -(-ROWS // BATCH) if BATCH else 0
DEAD_ROWS = max(ROWS // 10, 8 * BATCH)  # all libraries' defaults are for billions of rows: scaled, in their favour
torch.set_num_threads(int(JOB.get("threads", 2)))
torch.manual_seed(int(JOB.get("seed", 0)))
torch.zeros(1, device=DEVICE)  # a GPU's start-up is nobody's training time


def train_rows() -> torch.Tensor:
    """Return the rows to train on, (rows, d) float32; on a GPU all of them at once, to the peers' advantage."""
    return torch.from_numpy(np.load(FOLDER / "train.npy")).to(DEVICE)


def batches(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the batches that ours is trained on, in its order."""
    order = torch.from_numpy(np.load(FOLDER / "order.npy")).to(DEVICE)
    for step in range(STEPS):
        yield rows[order[step * BATCH : min(ROWS, (step + 1) * BATCH)]]


@torch.no_grad()
def report(seconds: float, codes: Callable[[torch.Tensor], torch.Tensor], decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write the held-out rows' reconstructions and say how often latents are active.

    Args:
        seconds: of training.
        codes: rows as stored to dense codes (rows, n), in inference mode.
        decode: those codes to rows as stored.
    """
    held = torch.from_numpy(np.load(FOLDER / "held.npy")).to(DEVICE)
    order = torch.from_numpy(np.load(FOLDER / "order.npy"))
    more = torch.from_numpy(np.load(FOLDER / "train.npy", mmap_mode="r")[order[:100_000].numpy()]).to(DEVICE)
    active, found, l0 = torch.zeros(N, dtype=torch.int64, device=DEVICE), [], 0
    for part in held.split(1024):
        z = codes(part)
        found.append(decode(z))
        active += (z != 0).sum(0)
        l0 += int((z != 0).sum())
    for part in more.split(1024):
        active += (codes(part) != 0).sum(0)
    np.save(FOLDER / "recon.npy", torch.cat(found).cpu().numpy())
    dead = float((active == 0).double().mean())
    print(json.dumps({"seconds": round(seconds, 1), "l0": l0 / len(held), "dead": dead}))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
