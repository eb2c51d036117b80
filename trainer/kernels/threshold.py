"""BatchTopK's selection without sorting the batch: a carried threshold, the scores over it, the exact cut among those.

A flat top-k of 4,096 x 16,384 scores takes 810 ms, this 50 (../shared/research/kernels.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from trainer.code import SparseCode

MARGIN = 0.9  # of the last threshold: what lies between is taken too, and dropped again
SAMPLE_ROWS = 64
SURPLUS = 1.2  # how many more pairs than wanted a threshold from a sample of rows should let through


def over_guess(
    over: Callable[[float], SparseCode], x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: int, guess: float
) -> SparseCode:
    """Return all scores over some threshold that at least `pairs` scores are over, or all positive ones.

    Args:
        over: returns the scores over a threshold.
        x: (batch, d_in) centred rows.
        W_enc: (n_latents, d_in).
        b_enc: (n_latents,).
        pairs: how many are wanted.
        guess: the last batch's threshold; 0 when there is none.
    """
    low = MARGIN * guess if guess > 0 else sampled(x, W_enc, b_enc, pairs)
    smallest = 1e-3 * low
    while True:
        found = over(max(low, 0.0))
        if len(found.indices) >= pairs or low <= 0:
            return found
        low = low / 2 if low > smallest else 0.0


def sampled(x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: int) -> float:
    """Return a threshold that somewhat more than `pairs` scores of the batch should be over, from some of its rows."""
    rows = x[:: max(1, len(x) // SAMPLE_ROWS)]
    wanted = min(len(rows) * len(W_enc), max(1, round(SURPLUS * pairs * len(rows) / len(x))))
    return float(F.linear(rows, W_enc, b_enc).flatten().topk(wanted).values[-1])


def largest(code: SparseCode, pairs: int) -> SparseCode:
    """Return the code's `pairs` largest values; of equal ones at the cut the first, row by row.

    Example:
        >>> import torch
        >>> code = SparseCode(torch.tensor([3, 5, 1]), torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0, 2, 3]))
        >>> largest(code, 2).indices.tolist(), largest(code, 2).offsets.tolist()
        ([3, 5], [0, 2, 2])
    """
    if len(code.values) <= pairs:
        return code
    cut = code.values.kthvalue(len(code.values) - pairs + 1).values
    kept = code.values > cut
    equal = (code.values == cut).nonzero()[:, 0]
    kept[equal[: pairs - int(kept.sum())]] = True
    return code.kept(kept)
