"""The sparse code of a batch: which latents are active on which row, and how strongly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SparseCode(NamedTuple):
    """The active latents of each row, row after row (compressed sparse rows).

    Row b has the pairs offsets[b] to offsets[b + 1]. A value may be 0, so that a row with fewer active latents than k
    still has k pairs; a latent is active where its value is not 0.

    Args:
        indices: (pairs,) int64, the latent of each pair.
        values: (pairs,) activation of each pair.
        offsets: (batch + 1,) int64, where each row's pairs begin; the last one is the number of pairs.
    """

    indices: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    offsets: Int[Tensor, " rows_and_end"]

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    def rows(self) -> Int[Tensor, " pairs"]:
        """Return the row of each pair, (pairs,) int64."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(self.batch, device=counts.device), counts, output_size=len(self.indices))

    def kept(self, mask: Bool[Tensor, " pairs"]) -> SparseCode:
        """Return the code of the pairs that a mask keeps; differentiable in their values.

        Example:
            >>> code = of_k(torch.tensor([[2, 0], [1, 0]]), torch.tensor([[1.0, 5.0], [3.0, 0.0]]))
            >>> code.kept(code.values > 2)
            SparseCode(indices=tensor([0, 1]), values=tensor([5., 3.]), offsets=tensor([0, 1, 2]))
        """
        return SparseCode(self.indices[mask], self.values[mask], offsets_of(mask)[self.offsets])

    def dense(self, n_latents: int) -> Float[Tensor, "batch n_latents"]:
        """Return the code as a matrix, (batch, n_latents), zero where a latent is not active; differentiable.

        Example:
            >>> of_k(torch.tensor([[2, 0]]), torch.tensor([[1.0, 5.0]])).dense(4)
            tensor([[5., 0., 1., 0.]])
        """
        zeros = self.values.new_zeros(self.batch, n_latents)
        return zeros.index_put((self.rows(), self.indices), self.values, accumulate=True)


def of_k(indices: Int[Tensor, "batch k"], values: Float[Tensor, "batch k"]) -> SparseCode:
    """Return the code of rows that have k pairs each, from (batch, k) indices and values.

    Example:
        >>> of_k(torch.tensor([[2, 0]]), torch.tensor([[1.0, 5.0]])).offsets
        tensor([0, 2])
    """
    batch, k = indices.shape
    return SparseCode(indices.flatten(), values.flatten(), torch.arange(0, batch * k + 1, k, device=indices.device))


def where(scores: Float[Tensor, "batch n_latents"], mask: Bool[Tensor, "batch n_latents"]) -> SparseCode:
    """Return the code of the scores that a mask chooses; differentiable in the scores.

    Example:
        >>> scores = torch.tensor([[1.0, 5.0], [2.0, 0.5]])
        >>> where(scores, scores > 1).indices.tolist(), where(scores, scores > 1).offsets.tolist()
        ([1, 0], [0, 1, 2])
    """
    return SparseCode(mask.nonzero()[:, 1], scores[mask], offsets_of(mask.sum(1)))


def offsets_of(counts: Int[Tensor, " rows"] | Bool[Tensor, " rows"]) -> Int[Tensor, " rows_and_end"]:
    """Return where the pairs of each row begin, (rows + 1,) int64, from how many each has.

    Example:
        >>> offsets_of(torch.tensor([2, 0, 1]))
        tensor([0, 2, 2, 3])
    """
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)])
