"""A kernel whose rows or latents are spread over ranks: the chosen kernel on what is here, and what the ranks must agree on.

TopK over spread latents: every rank's k largest scores are candidates; the k largest of all of them win, of equal scores the
lower latent; each rank keeps its winners, and the decoded parts are added up. Source: openai/sparse_autoencoder's feature
shards (Gao et al. 2024, arXiv 2406.04093, appendix D.2); exact here, also in the order of equal scores.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.code import SparseCode
from trainer.distributed import Mesh, Ranks
from trainer.kernels import auxiliary, reference
from trainer.kernels.threshold import MARGIN, largest, over_guess, sampled


class Sharded(ModuleType):
    """A kernel, as `trainer.kernels` has them, for a share of the rows or of the latents.

    Args:
        kernel: what computes on the share.
        mesh: how rows or latents are spread.
        first: number of this rank's latent 0.
    """

    def __init__(self, kernel: ModuleType, mesh: Mesh, first: int) -> None:
        super().__init__(kernel.__name__)
        self.kernel, self.mesh, self.first = kernel, mesh, first
        self.project_rows_, self.normalize_rows_ = kernel.project_rows_, kernel.normalize_rows_

    def _of(self, x: Tensor) -> ModuleType:
        """Return the kernel for these rows: plain autograd where a short last batch has none for this rank."""
        return self.kernel if len(x) else reference

    def encode_topk(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> SparseCode:
        """Return this rank's part of each row's k largest; see `reference.encode_topk`."""
        code = self._of(x).encode_topk(x, W_enc, b_enc, b_dec, min(k, len(W_enc)))
        return top_of_all(code, k, self.first, self.mesh.latents)

    def encode_over(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, threshold: Tensor) -> SparseCode:
        """Return each score over its latent's threshold: no rank needs another's; see `reference.encode_over`."""
        code: SparseCode = self._of(x).encode_over(x, W_enc, b_enc, b_dec, threshold)
        return code

    def encode_batchtopk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, pairs: int, guess: float = 0.0
    ) -> SparseCode:
        """Return this rank's part of the batch's `pairs` largest; see `reference.encode_batchtopk`."""
        ranks = self.mesh.world
        low = MARGIN * guess
        if guess <= 0:
            centred = x if b_dec is None else x - b_dec
            low = sampled(centred.detach(), W_enc.detach(), b_enc.detach(), -(-pairs // ranks.world)) if len(x) else 0.0
            low = ranks.largest(low, "the first threshold")
        over = partial(self.encode_over, x, W_enc, b_enc, b_dec)
        enough = lambda n: ranks.total(n, "the scores over the threshold") >= pairs  # noqa: E731
        return largest(over_guess(lambda low: over(torch.full_like(b_enc, low)), low, enough), pairs, ranks)

    def squared_error(self, target: Tensor, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed squared error of these rows, and the residual; see `reference.squared_error`."""
        ranks = self.mesh.latents
        if ranks.world > 1:
            with torch.no_grad():
                mine = F.embedding_bag(code.indices, W_dec, code.offsets[:-1], per_sample_weights=code.values, mode="sum")
                target = target - (ranks.sum_(mine.clone(), "the decoded parts") - mine)
            # Every rank has all of b_dec's gradient from here, but only its own part of it from the encoder: both add up.
            b_dec = b_dec.detach() + (b_dec - b_dec.detach()) / ranks.world
        found: tuple[Tensor, Tensor] = self._of(target).squared_error(target, code, W_dec, b_dec)
        return found

    def dead_squared_error(
        self, x: Tensor, target: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Int[Tensor, " n_dead"], k: int
    ) -> Float[Tensor, ""]:
        """Return AuxK's summed squared error, with the k largest of all ranks' dead latents; see `reference`."""
        if self.mesh.latents.world > 1:
            return auxiliary.dead_squared_error(x, target, W_enc, b_enc, W_dec, dead, k, self.mesh.latents)
        found: Tensor = self._of(x).dead_squared_error(x, target, W_enc, b_enc, W_dec, dead, k)
        return found


def top_of_all(code: SparseCode, k: int, first: int, latents: Ranks) -> SparseCode:
    """Return what of this rank's candidates is among each row's k largest over all ranks; of equal ones the lower latent.

    Args:
        code: the same number of pairs for each row, at most k, after ReLU.
        k: pairs a row over all ranks.
        first: number of this rank's latent 0.
        latents: the ranks.
    """
    if latents.world == 1 or not code.batch:
        return code
    mine = code.values.detach().view(code.batch, -1)
    room = (0, k - mine.shape[1])
    every = torch.cat(latents.gather(F.pad(mine, room), "the candidates"), dim=1)
    cut = every.topk(k, dim=1).values[:, -1:]
    kept = ~(mine < cut) & ~(mine <= 0)  # a score that is NaN stays, and is found in the loss
    if bool((((every >= cut) & (every > 0)).sum(1) > k).any()):
        indices = code.indices.view(code.batch, -1) + first
        numbers = torch.cat(latents.gather(F.pad(indices, room, value=-1), "the candidates' latents"), dim=1)
        last = torch.iinfo(numbers.dtype).max
        room_left = (k - (every > cut).sum(1, keepdim=True)).clamp_min(1)
        at_cut = torch.where(every == cut, numbers, last).sort(dim=1).values.gather(1, room_left - 1)
        kept &= (mine > cut) | (indices <= at_cut)
    return code.kept(kept.flatten())
