"""BatchTopK's selection without sorting the batch: a carried threshold, the scores over it, the exact cut among those.

A flat top-k of 4,096 x 16,384 scores takes 810 ms, this 50 (../shared/research/kernels.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.code import SparseCode
from trainer.distributed import ONE, Ranks

MARGIN = 0.9  # of the last threshold: what lies between is taken too, and dropped again
SAMPLE_ROWS = 64
SURPLUS = 1.2  # how many more pairs than wanted a threshold from a sample of rows should let through


def over_guess(over: Callable[[float], SparseCode], low: float, enough: Callable[[int], bool]) -> SparseCode:
    """Return all scores over a threshold, lowered until there are enough of them, or all positive ones.

    Args:
        over: returns the scores over a threshold.
        low: the first one tried.
        enough: whether so many scores are.
    """
    smallest = 1e-3 * low
    while True:
        found = over(max(low, 0.0))
        if low <= 0 or enough(len(found.indices)):
            return found
        low = low / 2 if low > smallest else 0.0


def sampled(x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: int) -> float:
    """Return a threshold that somewhat more than `pairs` scores of the batch should be over, from some of its rows."""
    rows = x[:: max(1, len(x) // SAMPLE_ROWS)]
    wanted = min(len(rows) * len(W_enc), max(1, round(SURPLUS * pairs * len(rows) / len(x))))
    return float(F.linear(rows, W_enc, b_enc).flatten().topk(wanted).values[-1])


def largest(code: SparseCode, pairs: int, ranks: Ranks = ONE) -> SparseCode:
    """Return this rank's part of the `pairs` largest values of all ranks; of equal ones at the cut the first ones.

    Example:
        >>> code = SparseCode(torch.tensor([3, 5, 1]), torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0, 2, 3]))
        >>> largest(code, 2).indices.tolist(), largest(code, 2).offsets.tolist()
        ([3, 5], [0, 2, 2])
    """
    values = code.values.detach()
    counts = [int(n) for n in ranks.gather(torch.tensor(len(values)), "how many scores each rank has")]
    if sum(counts) <= pairs:
        return code
    padded = ranks.gather(F.pad(values, (0, max(counts) - len(values))), "the scores over the threshold")
    every = torch.cat([part[:n] for part, n in zip(padded, counts, strict=True)])
    cut = every.kthvalue(len(every) - pairs + 1).values
    kept, equal = values > cut, (values == cut).nonzero()[:, 0]
    before = int((every[: sum(counts[: ranks.rank])] == cut).sum())
    kept[equal[: max(0, pairs - int((every > cut).sum()) - before)]] = True
    return code.kept(kept)
