"""Loss terms that several architectures share."""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.sae import SparseAutoencoder

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
    sae: SparseAutoencoder, x: Float[Tensor, "batch d_model"], residual: Float[Tensor, "batch d_model"],
    dead: Bool[Tensor, " n_latents"], kernel: ModuleType,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return AuxK = ‖e - ê‖² / ‖e - mean e‖², where the k_aux largest dead latents make ê; zero when none is dead.

    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2. Ours: where many latents are dead it is taken on evenly
    spaced rows (`aux_rows`). Rows of a batch are in random order, so this is the same loss from fewer samples.

    Args:
        sae: the SAE; its b_dec belongs to the main loss alone, because it is on both sides of the residual.
        x: rows.
        residual: e = x - x̂, detached.
        dead: which latents are dead.
        kernel: module of `trainer.kernels`.
    """
    (which,) = dead.nonzero(as_tuple=True)
    if not len(which) or not sae.config.aux_alpha:
        return x.new_zeros(())
    every = aux_rows(len(x), len(which), sae.config.n_latents)
    rows, target = (x[::every] - sae.b_dec.detach()), residual[::every].contiguous()
    error: Tensor = kernel.dead_squared_error(rows, target, sae.W_enc, sae.b_enc, sae.W_dec, which, sae.config.aux_k)
    return error / (target - target.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
