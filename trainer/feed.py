"""From windows of stored rows to batches on the device: gathered, converted to float32 and scaled in one pass.

A batch is written into one of two buffers in turn. On CUDA these are pinned, and a stream of its own copies each to the
device while the step before still runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.gather import gather

Rows = npt.NDArray[Any]
Places = npt.NDArray[np.int64]


def feed(windows: Iterable[tuple[Rows, Places]], batch_size: int, device: torch.device, scale: float = 1.0) -> Iterator[Tensor]:
    """Yield batches of rows[places], window after window; a batch may cross them, the last may be smaller.

    Args:
        windows: (n, d_model) rows of float32, float16 or bfloat16, and (m,) int64 places in them.
        batch_size: rows of a batch.
        device: where batches are wanted.
        scale: what each row is multiplied with.

    Yields: (batch, d_model) float32; valid until the next one is asked for.
    """
    batches = _gathered(windows, batch_size, scale, pinned=device.type == "cuda")
    if device.type == "cuda":
        yield from _copied(batches, device)
    else:
        for batch in batches:
            yield batch.to(device)


def _gathered(windows: Iterable[tuple[Rows, Places]], size: int, scale: float, pinned: bool) -> Iterator[Tensor]:
    """Yield batches in main memory, in one of two buffers in turn."""
    buffers: list[Tensor] = []
    filled = turn = 0
    for rows, places in windows:
        buffers = buffers or [torch.empty(size, rows.shape[1], pin_memory=pinned) for _ in range(2)]
        at = 0
        while at < len(places):
            count = min(size - filled, len(places) - at)
            gather(rows, places[at : at + count], scale, buffers[turn][filled : filled + count])
            at, filled = at + count, filled + count
            if filled == size:
                yield buffers[turn]
                filled, turn = 0, 1 - turn
    if filled:
        yield buffers[turn][:filled]


def _copied(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield pinned batches on a CUDA device, each copied while the one before is in use."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    user = torch.cuda.current_stream(device)
    previous: Tensor | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = batch.to(device, non_blocking=True)
        if previous is not None:
            yield previous
        stream.synchronize()  # long over; its buffer is written again in the turn after next
        copy.record_stream(user)
        previous = copy
    if previous is not None:
        yield previous
