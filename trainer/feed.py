"""From windows of stored rows to batches on the device: gathered, converted to float32 and scaled in one pass.

A batch is written into one of two buffers in turn. On CUDA these are pinned, and a stream of its own copies each to the
device while the step before still runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import prange
from torch import Tensor

from trainer.kernels.compiled import TASKS, loops, span

Rows = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
HALF = np.float32(2.0**112)  # what a float16's exponent lacks when its bits stand in a float32


@loops
def _gather_float(rows: Any, places: Any, scale: Any, out: Any) -> None:
    for task in prange(TASKS):
        low, high = span(task, len(places))
        for i in range(low, high):
            source, target = rows[places[i]], out[i]
            for c in range(len(target)):
                target[c] = source[c] * scale


@loops
def _gather_bits(rows: Any, places: Any, factor: Any, half: bool, bits: Any, out: Any) -> None:
    """As `_gather_float`, for the bits of bfloat16, the upper half of a float32's, or of float16.

    Those of a float16, moved to a float32's places, lack 2^112 of exponent: the factor has it.
    """
    for task in prange(TASKS):
        low, high = span(task, len(places))
        for i in range(low, high):
            source, target, numbers = rows[places[i]], bits[i], out[i]
            if half:
                for c in range(len(target)):
                    h = np.uint32(source[c])
                    target[c] = ((h & np.uint32(0x8000)) << np.uint32(16)) | ((h & np.uint32(0x7FFF)) << np.uint32(13))
            else:
                for c in range(len(target)):
                    target[c] = np.uint32(source[c]) << np.uint32(16)
            for c in range(len(target)):
                numbers[c] *= factor


def gather(rows: npt.NDArray[Any], places: npt.NDArray[np.int64], scale: float, out: Tensor) -> None:
    """Write scale · rows[places] as float32.

    Args:
        rows: (n, d) float32, float16 or bfloat16, finite.
        places: (m,) int64, each in [0, n).
        scale: a float32 factor.
        out: (m, d) float32, contiguous, written.

    Example:
        >>> out = torch.empty(2, 1)
        >>> gather(np.array([[1.0], [2.0], [3.0]], np.float16), np.array([2, 0]), 2.0, out)
        >>> out.flatten()
        tensor([6., 2.])
    """
    factor, numbers, half = np.float32(scale), out.numpy(), rows.dtype == np.float16
    if rows.dtype == np.float32:
        _gather_float(rows, places, factor, numbers)
    else:
        _gather_bits(rows.view(np.uint16), places, factor * HALF if half else factor, half, numbers.view(np.uint32), numbers)


def feed(
    windows: Iterable[tuple[Sequence[Rows], Places]], batch_size: int, device: torch.device, scales: Sequence[float]
) -> Iterator[list[Tensor]]:
    """Yield batches of rows[places], window after window; a batch may cross them, the last may be smaller.

    Args:
        windows: of each store (n, d_model) rows of float32, float16 or bfloat16; (m,) int64 places in them.
        batch_size: rows of a batch.
        device: where batches are wanted.
        scales: what each store's rows are multiplied with.

    Yields: (batch, d_model) float32 of each store; valid until the next ones are asked for.
    """
    batches = _gathered(windows, batch_size, scales, pinned=device.type == "cuda")
    if device.type == "cuda":
        yield from _copied(batches, device)
    else:
        for batch in batches:
            yield [part.to(device) for part in batch]


def _gathered(
    windows: Iterable[tuple[Sequence[Rows], Places]], size: int, scales: Sequence[float], pinned: bool
) -> Iterator[list[Tensor]]:
    """Yield batches in main memory, in one of two buffers in turn."""
    buffers: list[list[Tensor]] = []
    filled = turn = 0
    for stored, places in windows:
        buffers = buffers or [[torch.empty(size, rows.shape[1], pin_memory=pinned) for rows in stored] for _ in range(2)]
        at = 0
        while at < len(places):
            count = min(size - filled, len(places) - at)
            for rows, scale, buffer in zip(stored, scales, buffers[turn], strict=True):
                gather(rows, places[at : at + count], scale, buffer[filled : filled + count])
            at, filled = at + count, filled + count
            if filled == size:
                yield buffers[turn]
                filled, turn = 0, 1 - turn
    if filled:
        yield [buffer[:filled] for buffer in buffers[turn]]


def _copied(batches: Iterator[list[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Yield pinned batches on a CUDA device, each copied while the one before is in use."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    user = torch.cuda.current_stream(device)
    previous: list[Tensor] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copies = [part.to(device, non_blocking=True) for part in batch]
        if previous is not None:
            yield previous
        stream.synchronize()  # long over; its buffer is written again in the turn after next
        for copy in copies:
            copy.record_stream(user)
        previous = copies
    if previous is not None:
        yield previous
