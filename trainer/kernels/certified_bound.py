"""How far a bfloat16 score may be from the float32 one.

Let x be a centred row, w a latent's encoder row, x' and w' their bfloat16 roundings, s the bfloat16 score of x'·w' + b.

    |(x·w + b) - s| <= e + |s| 2^-7,
    e = |x - x'| max|w| + |x'| max|w - w'| + d 2^-24 |x'| max|w'| 1.01 + max|b| 2^-8

by Cauchy and Schwarz on the rounding errors, which are known exactly, the accumulation in float32 (Higham 2002, section
3.1) and the rounding of bias and result, each counted twice.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

Numbers = TypeVar("Numbers", npt.NDArray[np.float32], Tensor)
RELATIVE_RESULT = 2.0**-7  # of a score: rounding of the result, counted twice


def error_bound(row_norm: Numbers, row_error: Numbers, weight_norm: Any, weight_error: Any, bias: Any, d: int) -> Numbers:
    """Return e of the module's first lines for each row.

    Args:
        row_norm: (rows,) of the rounded centred rows.
        row_error: (rows,) norm of what their rounding took.
        weight_norm: largest norm of an encoder row, rounded or not.
        weight_error: largest norm of what its rounding took.
        bias: largest absolute encoder bias.
        d: width of a row.
    """
    accumulated = 1.01 * d * 2.0**-24  # the norms themselves are float32 sums: 1.001 covers them
    found: Numbers = 1.001 * (row_error * weight_norm + row_norm * (weight_error + accumulated * weight_norm) + bias * 2.0**-8)
    return found
