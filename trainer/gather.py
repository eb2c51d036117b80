"""The compiled loops of the feeder: where the shuffled order sends a row, and rows of any stored dtype as float32.

Stored numbers become float32 and are scaled in the pass that gathers them, so a batch is written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange
from torch import Tensor

from trainer.kernels.compiled import CACHED, TASKS, loops, span

Int64 = npt.NDArray[np.int64]
HALF = np.float32(2.0**112)  # what a float16's exponent lacks when its bits stand in a float32
EXACT: dict[str, Any] = {"cache": CACHED, "nogil": True}


@dataclass(frozen=True, slots=True)
class Runs:
    """Sorted numbers of rows, held as runs of consecutive ones: 16 bytes a run, where the rows would take 8 each.

    Args:
        starts: (n,) int64, first row of each run.
        before: (n + 1,) int64, rows in the runs before each; the last is the number of all.

    Example:
        >>> runs = Runs.of([(0, np.array([True, False, True])), (3, np.array([True, False, True]))])
        >>> len(runs), runs[np.array([0, 1, 2, 3])].tolist()
        (4, [0, 2, 3, 5])
    """

    starts: Int64
    before: Int64

    @classmethod
    def of(cls, kept: Iterable[tuple[int, npt.NDArray[np.bool_]]]) -> Runs:
        """Return the rows kept: pairs of a first row and a mask of the rows from there on, in order."""
        edges = [first + np.flatnonzero(np.diff(mask, prepend=False, append=False)) for first, mask in kept]
        found = np.concatenate(edges).reshape(-1, 2)
        return cls(found[:, 0].copy(), np.concatenate([[0], np.cumsum(found[:, 1] - found[:, 0])]))

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.before[-1])

    def __getitem__(self, places: Int64) -> Int64:
        """Return the rows at some places, each in [0, len)."""
        run = np.searchsorted(self.before, places, side="right") - 1
        return self.starts[run] + (places - self.before[run])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all rows, (len,) int64."""
        return self[np.arange(len(self))].astype(dtype or np.int64, copy=False)


@njit(**EXACT)
def mix(x: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele, Lea, Flood 2014); wraps by design."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(**EXACT)
def walk(
    positions: npt.NDArray[np.int64], n: int, keys: npt.NDArray[np.uint64], half: np.uint64, out: npt.NDArray[np.int64]
) -> None:
    """Write where a Feistel network of some rounds sends each position, walking on while it leaves [0, n).

    Args:
        positions: (m,) int64 in [0, n).
        n: size of the domain, at most 2^(2 half).
        keys: (rounds,) uint64.
        half: bits of half a position.
        out: (m,) int64, written.
    """
    mask = (np.uint64(1) << half) - np.uint64(1)
    for i in range(len(positions)):
        at = np.uint64(positions[i])
        while True:
            low, high = at & mask, at >> half
            for r in range(len(keys)):
                low, high = high ^ (mix(low + keys[r]) & mask), low
            at = (high << half) | low
            if at < np.uint64(n):
                break
        out[i] = np.int64(at)


@loops
def _gather_float(rows: Any, places: Any, scale: Any, out: Any) -> None:
    for task in prange(TASKS):
        low, high = span(task, len(places))
        for i in range(low, high):
            source, target = rows[places[i]], out[i]
            for c in range(len(target)):
                target[c] = source[c] * scale


@loops
def _gather_half(rows: Any, places: Any, scale: Any, bits: Any, out: Any) -> None:
    """As `_gather_float`, for float16 bits; a number's bits, moved to float32's places, lack 2^112 of exponent."""
    factor = HALF * scale
    for task in prange(TASKS):
        low, high = span(task, len(places))
        for i in range(low, high):
            source, target, numbers = rows[places[i]], bits[i], out[i]
            for c in range(len(target)):
                h = np.uint32(source[c])
                target[c] = ((h & np.uint32(0x8000)) << np.uint32(16)) | ((h & np.uint32(0x7FFF)) << np.uint32(13))
            for c in range(len(target)):
                numbers[c] *= factor


@loops
def _gather_bfloat(rows: Any, places: Any, scale: Any, bits: Any, out: Any) -> None:
    """As `_gather_float`, for bfloat16 bits: the upper half of a float32's."""
    for task in prange(TASKS):
        low, high = span(task, len(places))
        for i in range(low, high):
            source, target, numbers = rows[places[i]], bits[i], out[i]
            for c in range(len(target)):
                target[c] = np.uint32(source[c]) << np.uint32(16)
            for c in range(len(target)):
                numbers[c] *= scale


def gather(rows: npt.NDArray[Any], places: npt.NDArray[np.int64], scale: float, out: Tensor) -> None:
    """Write scale · rows[places] as float32.

    Args:
        rows: (n, d) float32, float16 or bfloat16, finite.
        places: (m,) int64, each in [0, n).
        scale: a float32 factor.
        out: (m, d) float32, contiguous, written.
    """
    factor, numbers = np.float32(scale), out.numpy()
    if rows.dtype == np.float32:
        _gather_float(rows, places, factor, numbers)
    else:
        convert = _gather_half if rows.dtype == np.float16 else _gather_bfloat
        convert(rows.view(np.uint16), places, factor, numbers.view(np.uint32), numbers)
