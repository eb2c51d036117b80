"""Statistics of activations, gathered while writing: float64 moments, mergeable in row-group order, and counts of norms.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import FormatError
from actstore.limits import MAX_NORM_BIN

Float64 = npt.NDArray[np.float64]
BINS_PER_OCTAVE = 32
MASSIVE = 10.0  # times the median norm; int8.OUTLIER_NORMS is the same rule
QUANTILES = {"norm_min": 0.0, "norm_p01": 0.01, "norm_p50": 0.5, "norm_p99": 0.99, "norm_max": 1.0}
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
        norms: rows by bin of their norm, see `norm_bins`; None when not recorded, as in stores before this field.
    """

    rows: int
    mean: Float64
    m2: Float64
    max_abs: Float64
    norm_sum: float
    norms: dict[int, int] | None = None

    @property
    def total_variance(self) -> float:
        """Sum over dimensions of the population variance: the mean squared distance of a row from the mean."""
        return float(self.m2.sum() / max(self.rows, 1))

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return self.norm_sum / max(self.rows, 1)


def no_rows(d_model: int) -> Moments:
    """Return the moments of no rows, the neutral element of `merge`.

    Example:
        >>> no_rows(2).mean.tolist()
        [0.0, 0.0]
    """
    return Moments(0, np.zeros(d_model), np.zeros(d_model), np.zeros(d_model), 0.0, {})


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of both sets together (Chan et al. 1979).

    Example:
        >>> merge(moments_of(np.ones((2, 1))), moments_of(np.zeros((2, 1)))).mean.tolist()
        [0.5]
    """
    if not a.rows or not b.rows:
        return a if a.rows else b
    rows, delta = a.rows + b.rows, b.mean - a.mean
    return Moments(
        rows,
        a.mean + delta * (b.rows / rows),
        a.m2 + b.m2 + delta**2 * (a.rows * b.rows / rows),
        np.maximum(a.max_abs, b.max_abs),
        a.norm_sum + b.norm_sum,
        None if a.norms is None or b.norms is None else {k: a.norms.get(k, 0) + b.norms.get(k, 0) for k in a.norms | b.norms},
    )


def norm_bins(norms: Float64) -> dict[int, int]:
    """Return the rows in each bin of their norm: bin k holds norms in [2^(k/32), 2^((k+1)/32)), the lowest also 0.

    Counts are integers, so histograms merge exactly, in any order. A bin is 2.2 % wide.

    Example:
        >>> norm_bins(np.array([1.0, 1.01, 2.0, 0.0]))
        {-4800: 1, 0: 2, 32: 1}
    """
    with np.errstate(divide="ignore"):
        bins = np.floor(np.log2(norms) * BINS_PER_OCTAVE)
    found, counts = np.unique(np.clip(bins, -MAX_NORM_BIN, MAX_NORM_BIN).astype(np.int64), return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def norm_of_bin(k: int) -> float:
    """Return the norm in the middle of a bin, at most 1.1 % from any norm in it; 0 for the lowest.

    Example:
        >>> round(norm_of_bin(32), 3)
        2.022
    """
    return 0.0 if k <= -MAX_NORM_BIN else 2.0 ** ((k + 0.5) / BINS_PER_OCTAVE)


def describe_norms(moments: Moments) -> dict[str, Any]:
    """Return norms and outliers of a set of activations; each None when the norms were not recorded.

    Returns: `norm_min` to `norm_max`, the norms at 0, 1, 50, 99 and 100 % of the rows; `outlier_severity`, the largest
        coordinate over the typical one, max|x| / (median norm / sqrt(d_model)), about 5 for Gaussian rows; `massive_rows`,
        those whose norm is over MASSIVE times the median norm, `massive_rows_share`, and `massive_norm_share`, their share
        of the sum of squared norms. All but counts are exact to 1.1 %, the width of half a bin.

    Example:
        >>> norms = describe_norms(moments_of(np.array([[3.0, 4.0]] * 98 + [[0.0, 500.0]] * 2)))
        >>> norms["massive_rows"], round(norms["massive_norm_share"], 2), round(norms["outlier_severity"])
        (2, 0.99, 141)
    """
    if not moments.norms:
        return dict.fromkeys((*QUANTILES, "outlier_severity", "massive_rows", "massive_rows_share", "massive_norm_share"))
    bins = sorted(moments.norms)
    reached = np.cumsum([moments.norms[k] for k in bins])
    ranks = {name: max(1, math.ceil(q * moments.rows)) for name, q in QUANTILES.items()}
    norms = {name: norm_of_bin(bins[int(np.searchsorted(reached, rank))]) for name, rank in ranks.items()}
    massive = [k for k in bins if norm_of_bin(k) > MASSIVE * norms["norm_p50"]]
    squares = {k: moments.norms[k] * norm_of_bin(k) ** 2 for k in bins}
    typical, massive_rows = norms["norm_p50"] / math.sqrt(len(moments.mean)), sum(moments.norms[k] for k in massive)
    return norms | {
        "outlier_severity": float(moments.max_abs.max()) / typical if typical else 0.0,
        "massive_rows": massive_rows,
        "massive_rows_share": massive_rows / moments.rows,
        "massive_norm_share": math.fsum(squares[k] for k in massive) / (math.fsum(squares.values()) or 1.0),
    }


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
        total = merge(total, Moments(len(x), mean, np.einsum("ij,ij->j", x, x), largest, float(norms.sum()), norm_bins(norms)))
    return total


def dump_moments(moments: Moments) -> dict[str, Any]:
    """Return the moments as JSON values; float64 as hexadecimal little-endian bytes, so that none loses a bit.

    Example:
        >>> dump_moments(no_rows(1))["norm_sum"]
        '0x0.0p+0'
    """

    def spell(values: Float64) -> str:
        return values.astype("<f8").tobytes().hex()

    recorded = {} if moments.norms is None else {"norms": {str(k): n for k, n in moments.norms.items()}}
    return recorded | {
        "rows": moments.rows,
        "mean": spell(moments.mean),
        "m2": spell(moments.m2),
        "max_abs": spell(moments.max_abs),
        "norm_sum": float(moments.norm_sum).hex(),
    }


def _parse_norms(value: Any, rows: int) -> dict[int, int]:
    if not isinstance(value, dict) or len(value) > 2 * MAX_NORM_BIN + 1:
        raise ValueError("norms must map bins to rows")
    norms = {int(k): n for k, n in value.items() if len(k) <= 5}
    if {str(k) for k in norms} != set(value) or any(abs(k) > MAX_NORM_BIN for k in norms):
        raise ValueError(f"norms must be counted in bins of -{MAX_NORM_BIN} to {MAX_NORM_BIN}")
    if any(type(n) is not int or n < 1 for n in norms.values()) or sum(norms.values()) != rows:
        raise ValueError(f"norms must count each of the {rows} rows once")
    return norms


def parse_moments(value: dict[str, Any], d_model: int, what: str) -> Moments:
    """Return the moments that `dump_moments` spelled. Raises: FormatError: other fields, widths or non-finite values.

    Example:
        >>> moments = moments_of(np.ones((2, 3)))
        >>> parse_moments(dump_moments(moments), 3, "x").mean_norm == moments.mean_norm
        True
    """
    try:
        fields = {name: np.frombuffer(bytes.fromhex(value[name]), "<f8") for name in ("mean", "m2", "max_abs")}
        norms = _parse_norms(value["norms"], value["rows"]) if "norms" in value else None
        moments = Moments(value["rows"], **fields, norm_sum=float.fromhex(value["norm_sum"]), norms=norms)
        if set(value) - {"norms"} != {"rows", "mean", "m2", "max_abs", "norm_sum"} or type(moments.rows) is not int:
            raise ValueError("fields differ")
        if any(a.shape != (d_model,) or not np.isfinite(a).all() for a in fields.values()):
            raise ValueError(f"each of mean, m2, max_abs must be {d_model} finite numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{what}: field statistics: {error}", where=what) from error
    return moments
