"""int8 storage of activations: columns standardised, one scale a row, rows it would spoil kept exact in float32.

For a row group x (n, d), all by itself, so that a row group stays a pure function of (key, index):

    ordinary = rows whose norm is at most OUTLIER_NORMS times the median norm
    mean, std = of each column over the ordinary rows (float64 sums, stored float32; std 0 -> 1)
    z = (x - mean) / std
    scale = max_j |z_j| / 127 of each row (below float32's normal numbers, 0 among them -> 1)
    q = rint(z / scale), in -127 … 127
    x^ = ((q * scale) * std) + mean, float32, in this order and nothing fused, so every reader gets the same bits

A row whose squared error |x^ - x|^2 is over MAX_ERROR times the total variance of the ordinary rows is kept exact: it
lies in the array `exact`, its codes are 0 and its scale is NaN, so whoever forgets it reads NaN, never a wrong number.
Every stored row has thus an error of at most MAX_ERROR variances, massive rows none.

Source: per-row absmax with separate outliers is LLM.int8() (Dettmers et al. 2022, section 3); standardised columns
instead of outlier columns is our measurement, 5.7e-5 against 1.4e-4 (../shared/research/store.md, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import FormatError

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
OUTLIER_NORMS = 10.0  # times the median norm: massive rows, which would widen the columns' scales for all others
MAX_ERROR = 1e-3  # squared error of a row over total variance; an SAE leaves 5e-2 and more unexplained
LARGEST = 127  # codes are symmetric; -128 is padding
SMALLEST = np.finfo(np.float32).tiny  # of a scale: below it q = z / scale could pass 127
# Scratch of 2 MiB at d_model 1024; 128 to 2,048 rows are no faster. Part of the rule: sums are taken piece by piece.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Quantised:
    """A row group as int8.

    Args:
        codes: (n, d_model) int8.
        scale: (n,) float32; NaN marks an exact row.
        columns: (2, d_model) float32, mean and standard deviation of each column.
        exact: (m,) records of `exact_dtype`, ascending in `row`.
    """

    codes: npt.NDArray[np.int8]
    scale: Float32
    columns: Float32
    exact: Array


def exact_dtype(d_model: int) -> np.dtype[Any]:
    """Return the record of one exact row: its place in the row group and its activations, little-endian.

    Example:
        >>> exact_dtype(16).itemsize
        68
    """
    return np.dtype([("row", "<i4"), ("acts", "<f4", (d_model,))])


def _pieces(n: int) -> Iterator[slice]:
    return (slice(start, min(n, start + _ROWS_AT_ONCE)) for start in range(0, n, _ROWS_AT_ONCE))


def _ordinary_columns(rows: Float32) -> tuple[Float32, float]:
    """Return (2, d_model) mean and standard deviation over the ordinary rows, and their total variance."""
    norms = np.concatenate([np.sqrt(np.square(rows[p], dtype=np.float64).sum(axis=1)) for p in _pieces(len(rows))])
    ordinary = norms <= OUTLIER_NORMS * np.median(norms)
    n = int(ordinary.sum())  # at least half of the rows
    total = np.zeros(rows.shape[1])
    for p in _pieces(len(rows)):
        total += rows[p][ordinary[p]].sum(axis=0, dtype=np.float64)
    mean, squares = total / n, np.zeros(rows.shape[1])
    for p in _pieces(len(rows)):
        centred = rows[p][ordinary[p]] - mean  # float64
        squares += np.square(centred, out=centred).sum(axis=0)
    columns = np.stack([mean, np.sqrt(squares / n)]).astype(np.float32)
    columns[1][columns[1] == 0] = 1
    return columns, float(squares.sum() / n)


def quantise(rows: Float32) -> Quantised:
    """Return a row group as int8, by the formulas of the module's first lines.

    Args:
        rows: (n, d_model) float32, finite, n >= 1.

    Example:
        >>> x = np.array([[1.0, -2.0], [3.0, 2.0], [2.0, 0.0]], np.float32)
        >>> q = quantise(x)
        >>> q.codes.tolist(), len(q.exact), bool(abs(restore(q.codes, q.scale, q.columns, q.exact, slice(None)) - x).max() < 1e-6)
        ([[-127, -127], [127, 127], [0, 0]], 0, True)
    """
    columns, variance = _ordinary_columns(rows)
    codes, scale = np.zeros(rows.shape, np.int8), np.empty(len(rows), np.float32)
    spoiled = np.empty(len(rows), bool)
    for p in _pieces(len(rows)):
        with np.errstate(over="ignore", invalid="ignore"):  # of values near float32's end: such rows are kept exact
            z = (rows[p] - columns[0]) / columns[1]
            scale[p] = np.maximum(z.max(axis=1), -z.min(axis=1)) / np.float32(LARGEST)
            scale[p][scale[p] < SMALLEST] = 1
            z /= scale[p][:, None]
            np.rint(z, out=z)
            fits = np.isfinite(scale[p])
            codes[p] = np.where(fits[:, None], z, 0)
            error = _dequantise(codes[p], scale[p], columns, z)
            error -= rows[p]
            squared = np.square(error, dtype=np.float64).sum(axis=1)
        spoiled[p] = ~(squared <= MAX_ERROR * variance)  # also when it is NaN
    places = np.flatnonzero(spoiled)
    exact = np.empty(len(places), exact_dtype(rows.shape[1]))
    exact["row"], exact["acts"] = places, rows[places]
    codes[places], scale[places] = 0, np.nan
    return Quantised(codes, scale, columns, exact)


def _dequantise(codes: Array, scale: Array, columns: Array, out: Float32) -> Float32:
    out[...] = codes  # a quarter faster than np.multiply with a dtype, which converts through a buffer
    out *= scale[:, None]
    out *= columns[1]
    out += columns[0]
    return out


def restore(
    codes: Array, scale: Array, columns: Array, exact: Array, rows: slice | npt.NDArray[np.int64], out: Float32 | None = None
) -> Float32:
    """Return rows of a row group as float32, exact rows put back; only the rows asked for are computed.

    Args:
        codes, scale, columns, exact: the row group; see `Quantised`.
        rows: which, as a slice of step 1 or (k,) int64 places in the row group.
        out: (k, d_model) float32 to fill; made when None.

    Raises: FormatError: a row is marked exact and is not among the exact rows.
    """
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(len(codes))
        rows = np.arange(start, max(start, stop))
    out = np.empty((len(rows), codes.shape[1]), np.float32) if out is None else out
    for p in _pieces(len(rows)):
        _dequantise(codes[rows[p]], scale[rows[p]], columns, out[p])
    marked = np.flatnonzero(np.isnan(scale[rows]))
    if len(marked):
        wanted = rows[marked]
        places = np.minimum(np.searchsorted(exact["row"], wanted), max(0, len(exact) - 1))
        if not len(exact) or (exact["row"][places] != wanted).any():
            raise FormatError("a row is marked exact, and the exact rows of its row group do not hold it", where="exact")
        out[marked] = exact["acts"][places]
    return out


def parse_exact(payload: Array, d_model: int, rows: int) -> Array:
    """Return the exact rows of a row group as a view of their bytes.

    Args:
        payload: (bytes,) uint8.
        d_model: width of a row.
        rows: rows of the row group.

    Raises: FormatError: the rows are not ascending places in the row group.

    Example:
        >>> len(parse_exact(np.zeros(0, np.uint8), d_model=16, rows=5))
        0
    """
    exact = payload.view(exact_dtype(d_model))
    places = exact["row"].astype(np.int64)
    if len(places) and (places[0] < 0 or places[-1] >= rows or (np.diff(places) <= 0).any()):
        raise FormatError(f"the exact rows are not ascending places below {rows}", where="exact")
    return exact
