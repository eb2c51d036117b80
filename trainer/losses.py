"""Loss terms that several architectures share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.code import SparseCode
from trainer.distributed import Ranks
from trainer.sae import Batch, Losses, SparseAutoencoder, Step

AUX_WORK = 1 / 16  # of the encoder's product: one of AuxK's four products, so AuxK costs at most a quarter of it


def aux_rows(batch: int, n_dead: int, n_latents: int) -> int:
    """Return on every how many rows AuxK is taken, so that its products stay a quarter of the encoder's.

    With up to a sixteenth of the latents dead these are all rows; with half of them, every eighth.

    Example:
        >>> aux_rows(4096, 128, 2048), aux_rows(4096, 1024, 2048), aux_rows(4, 1024, 2048)
        (1, 8, 4)
    """
    return max(1, min(batch, round(n_dead / n_latents / AUX_WORK)))


def aux_loss(
    sae: SparseAutoencoder, x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"], step: Step
) -> Float[Tensor, ""]:
    """Return AuxK = ‖e - ê‖² / ‖e - mean e‖², where the k_aux largest dead latents make ê; zero when none is dead.

    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2. Ours: where many latents are dead it is taken on evenly
    spaced rows (`aux_rows`). Rows of a batch are in random order, so this is the same loss from fewer samples.

    Args:
        sae: the SAE; its b_dec belongs to the main loss alone, because it is on both sides of the residual.
        x: rows.
        residual: e = y - ŷ, detached.
        step: says which latents are dead.
    """
    (which,), ranks = step.dead.nonzero(as_tuple=True), sae.mesh.rows
    n_dead = sae.mesh.latents.total(len(which), "the number of dead latents")
    if not n_dead or sae.config.dead != "auxk" or not sae.config.aux_alpha:
        return x.new_zeros(())
    every = aux_rows(step.count(x), n_dead, sae.config.n_latents)
    taken: slice | Tensor = slice(None, None, every)
    if ranks.world > 1:  # this rank has every world-th row of the batch, from its own number on
        taken = torch.arange(ranks.rank, ranks.rank + ranks.world * len(x), ranks.world, device=x.device) % every == 0
    n_rows = -(-step.count(x) // every)
    if n_rows < 2:  # the last batch may be short, and one row does not vary
        return x.new_zeros(())
    rows, target = (x[taken] - sae.centre.detach()), residual[taken].contiguous()
    weights = (sae.W_enc, sae.b_enc, sae.W_dec)
    error: Tensor = step.kernel.dead_squared_error(rows, target, *weights, which, min(sae.config.aux_k, n_dead))
    return error / _variation(target, n_rows, ranks).clamp_min(torch.finfo(x.dtype).tiny)


def _variation(target: Tensor, n_rows: int, ranks: Ranks) -> Tensor:
    """Return the summed squared distance of the rows of all ranks, n_rows together, from their mean."""
    if ranks.world == 1:
        return (target - target.mean(dim=0)).square().sum()
    mean = ranks.sum_(target.sum(0), "AuxK's mean") / n_rows
    return ranks.sum_((target - mean).square().sum(), "AuxK's variation")


def with_auxiliary(sae: SparseAutoencoder, batch: Batch, code: SparseCode, step: Step, penalty: Tensor | None = None) -> Losses:
    """Return the losses of a code: reconstruction in units of the variance, AuxK, and a sparsity penalty if there is one."""
    squared_error, residual = sae.squared_error(batch, code, step.kernel)
    reconstruction = squared_error / (step.count(batch.x) * step.variance)
    auxiliary = aux_loss(sae, batch.x, residual, step)
    total = reconstruction + sae.config.aux_alpha * auxiliary
    return Losses(total if penalty is None else total + penalty, reconstruction, auxiliary, code, squared_error)


def annealed_k(sae: SparseAutoencoder, share: float, step: Step) -> int:
    """Return the k of a step: from d_in it falls linearly to the configured one over the first `share` of the training.

    Source: `k_anneal_steps` of dictionary_learning's BatchTopKTrainer (saprmarks/dictionary_learning).
    """
    k, done = sae.config.k, step.progress
    if done >= share:
        return k
    begin = min(sae.config.n_latents, max(k, sae.widths.d_in))
    return max(k, round(begin + (k - begin) * done / share))
