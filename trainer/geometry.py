"""Angles between latents' directions: the nearest neighbour of each, within an SAE or in another one.

Products are taken in blocks, so memory grows with the number of latents, not with its square.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.saved import Cosines

COSINES_AT_ONCE = 1 << 23  # 32 MiB of float32
COSINE_EDGES = np.linspace(-1.0, 1.0, 41)


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "n d"], among: Float[Tensor, "m d"], count: int = 1, *, but_itself: bool = False
) -> tuple[Float[Tensor, "n count"], Int[Tensor, "n count"]]:
    """Return the largest cosines of each row to rows of another matrix, and which rows those are, largest first.

    Args:
        rows: (n, d) directions of any length; a row of zeros has cosine 0 to all.
        among: (m, d) directions.
        count: how many, at most m (m - 1 with `but_itself`).
        but_itself: row i of `among` does not count for row i: both are the same matrix.

    Returns: cosines (n, count) float32 on the CPU, indices (n, count) int64.

    Example:
        >>> cosines, indices = nearest(torch.eye(2), torch.tensor([[0.0, 2.0], [3.0, 3.0]]))
        >>> [round(c, 3) for c in cosines.flatten().tolist()], indices.flatten().tolist()
        ([0.707, 1.0], [1, 0])
    """
    unit, columns = F.normalize(rows.float(), dim=1), F.normalize(among.float(), dim=1).T
    values, indices = torch.empty(len(rows), count), torch.empty(len(rows), count, dtype=torch.int64)
    size = max(1, COSINES_AT_ONCE // len(among))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        cosines = unit[part] @ columns
        if but_itself:
            cosines.diagonal(start).fill_(-2.0)  # less than any cosine
        found = cosines.topk(count, dim=1)
        values[part], indices[part] = found.values.cpu(), found.indices.cpu()
    return values.clamp_(-1, 1), indices


def max_cosines(W_dec: Float[Tensor, "n_latents d"]) -> tuple[Float[Tensor, " n_latents"], Int[Tensor, " n_latents"]]:
    """Return each latent's largest cosine to another latent of its SAE, and which one that is.

    High values say that a direction was learned twice or split (SAEBench, `core` metrics: decoder max-cosine).

    Args:
        W_dec: (n_latents, d) decoder rows, of any length.

    Returns: (n_latents,) float32, and (n_latents,) int64; of a single latent 0 and itself.

    Example:
        >>> cosines, others = max_cosines(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        >>> [round(c, 3) for c in cosines.tolist()], others[:2].tolist()
        ([0.707, 0.707, 0.707], [2, 2])
    """
    if len(W_dec) < 2:
        return torch.zeros(len(W_dec)), torch.zeros(len(W_dec), dtype=torch.int64)
    values, indices = nearest(W_dec, W_dec, but_itself=True)
    return values[:, 0], indices[:, 0]


def cosine_histogram(cosines: Float[Tensor, " n"]) -> Cosines:
    """Return a histogram of cosines: `edges` in steps of 0.05 from -1 to 1, and how many `latents` lie between them.

    Example:
        >>> found = cosine_histogram(torch.tensor([1.0, 0.99, -1.0]))
        >>> found.latents[0], found.latents[-1], found.edges[-3:]
        (1, 2, [0.9, 0.95, 1.0])
    """
    counts, _ = np.histogram(cosines.numpy(), COSINE_EDGES)
    edges = [round(float(edge), 2) for edge in COSINE_EDGES]
    return Cosines(edges=edges, latents=counts.tolist(), median=float(np.median(cosines.numpy())))
