"""Statistics of activations, gathered while writing: float64, mergeable in row-group order.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import FormatError

Float64 = npt.NDArray[np.float64]
ROWS_AT_ONCE = 4096  # float64 scratch of 32 MiB at d_model 1024


@dataclass(frozen=True, slots=True)
class Moments:
    """Running moments of a set of activations.

    Args:
        rows: rows counted.
        mean: (d_model,) float64, mean of each dimension.
        m2: (d_model,) float64, sum over rows of the squared distance from `mean`, of each dimension.
        max_abs: (d_model,) float64, largest absolute value of each dimension.
        norm_sum: sum over rows of the Euclidean norm.
    """

    rows: int
    mean: Float64
    m2: Float64
    max_abs: Float64
    norm_sum: float

    @property
    def total_variance(self) -> float:
        """Sum over dimensions of the population variance: the mean squared distance of a row from the mean."""
        return float(self.m2.sum() / max(self.rows, 1))

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return self.norm_sum / max(self.rows, 1)


def no_rows(d_model: int) -> Moments:
    """Return the moments of no rows, the neutral element of `merge`."""
    return Moments(0, np.zeros(d_model), np.zeros(d_model), np.zeros(d_model), 0.0)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of both sets together (Chan et al. 1979)."""
    if not a.rows or not b.rows:
        return a if a.rows else b
    rows, delta = a.rows + b.rows, b.mean - a.mean
    return Moments(
        rows,
        a.mean + delta * (b.rows / rows),
        a.m2 + b.m2 + delta**2 * (a.rows * b.rows / rows),
        np.maximum(a.max_abs, b.max_abs),
        a.norm_sum + b.norm_sum,
    )


def moments_of(acts: npt.NDArray[Any]) -> Moments:
    """Return the moments of `acts` (rows, d_model), any float dtype.

    Example:
        >>> m = moments_of(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
        >>> m.mean.tolist(), m.total_variance, m.mean_norm
        ([1.5, 2.0], 6.25, 2.5)
    """
    total = no_rows(acts.shape[1])
    for start in range(0, len(acts), ROWS_AT_ONCE):
        x = acts[start : start + ROWS_AT_ONCE].astype(np.float64)
        mean = x.mean(axis=0)
        largest, norms = np.abs(x).max(axis=0), np.sqrt(np.einsum("ij,ij->i", x, x))
        x -= mean
        total = merge(total, Moments(len(x), mean, np.einsum("ij,ij->j", x, x), largest, float(norms.sum())))
    return total


def dump_moments(moments: Moments) -> dict[str, Any]:
    """Return the moments as JSON values; float64 as hexadecimal little-endian bytes, so that none loses a bit."""

    def spell(values: Float64) -> str:
        return values.astype("<f8").tobytes().hex()

    return {
        "rows": moments.rows,
        "mean": spell(moments.mean),
        "m2": spell(moments.m2),
        "max_abs": spell(moments.max_abs),
        "norm_sum": float(moments.norm_sum).hex(),
    }


def parse_moments(value: dict[str, Any], d_model: int, what: str) -> Moments:
    """Return the moments that `dump_moments` spelled. Raises: FormatError: other fields, widths or non-finite values."""
    try:
        fields = {name: np.frombuffer(bytes.fromhex(value[name]), "<f8") for name in ("mean", "m2", "max_abs")}
        moments = Moments(value["rows"], **fields, norm_sum=float.fromhex(value["norm_sum"]))
        if set(value) != {"rows", "mean", "m2", "max_abs", "norm_sum"} or type(moments.rows) is not int:
            raise ValueError("fields differ")
        if any(a.shape != (d_model,) or not np.isfinite(a).all() for a in fields.values()):
            raise ValueError(f"each of mean, m2, max_abs must be {d_model} finite numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{what}: field statistics: {error}", where=what) from error
    return moments
