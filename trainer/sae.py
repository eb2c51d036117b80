"""The common sparse autoencoder: four parameters, what encodes, what decodes, what a loss returns."""

from __future__ import annotations

import math
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.code import SparseCode
from trainer.config import SaeConfig
from trainer.kernels.reference import normalize_rows_


class Losses(NamedTuple):
    """What an architecture's loss returns: scalars to add up, the code and the summed squared error for metrics."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    code: SparseCode
    squared_error: Float[Tensor, ""]


class SparseAutoencoder(nn.Module):
    """An SAE with `W_enc` (n_latents, d_model), `b_enc` (n_latents,), `W_dec` (n_latents, d_model), `b_dec` (d_model,).

    Both matrices are stored latent by latent, so everything that touches only active latents reads contiguous rows.
    Subclasses define `select` and `losses`.

    Args:
        config: the resolved configuration.
        d_model: width of a row.
    """

    arch: ClassVar[str]

    def __init__(self, config: SaeConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.W_enc = nn.Parameter(torch.empty(config.n_latents, d_model))
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.W_dec = nn.Parameter(torch.empty(config.n_latents, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def pre_activations(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch n_latents"]:
        """Return the encoder's output before the sparsity rule: (x - b_dec) W_encᵀ + b_enc."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.T)

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the active latents of each row: the architecture's sparsity rule."""
        raise NotImplementedError

    def losses(
        self, x: Float[Tensor, "batch d_model"], dead: Bool[Tensor, " n_latents"], variance: float, kernel: ModuleType
    ) -> Losses:
        """Return the training losses.

        Args:
            x: (batch, d_model) scaled rows.
            dead: (n_latents,) which latents count as dead.
            variance: typical squared distance of a row from the centre; the losses are in units of it.
            kernel: module of `trainer.kernels`.
        """
        raise NotImplementedError

    def encode_sparse(self, x: Float[Tensor, "batch d_model"]) -> SparseCode:
        """Return the active latents of each row."""
        return self.select(self.pre_activations(x))

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch n_latents"]:
        """Return the dense code, zero where a latent is not active."""
        return self.encode_sparse(x).dense(self.config.n_latents)

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction of a sparse code; touches active latents only."""
        return (
            F.embedding_bag(code.indices, self.W_dec, code.offsets[:-1], per_sample_weights=code.values, mode="sum") + self.b_dec
        )

    def decode(self, codes: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction of dense codes: codes W_dec + b_dec."""
        return torch.addmm(self.b_dec, codes, self.W_dec)


@torch.no_grad()
def initialize_(sae: SparseAutoencoder, centre: Float[Tensor, " d_model"]) -> None:
    """Set the initial parameters from the configuration's seed.

    Decoder rows are random directions of norm 1, the encoder is the decoder, biases are zero, `b_dec` is the centre of
    the data: Gao et al. 2024 (arXiv 2406.04093), appendix A.1.
    """
    generator = torch.Generator().manual_seed(sae.config.seed)
    sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
    normalize_rows_(sae.W_dec)
    sae.W_enc.copy_(sae.W_dec)
    sae.b_enc.zero_()
    sae.b_dec.copy_(centre)


@torch.no_grad()
def geometric_median(rows: Float[Tensor, "n d_model"], steps: int = 100) -> Float[Tensor, " d_model"]:
    """Return the point of least summed distance to all rows, by Weiszfeld's iteration.

    Unlike the mean it ignores the few massive rows (position 0) that many models have. Source: used for `b_dec` by
    Bricken et al. 2023 and Gao et al. 2024, appendix A.1.

    Example:
        >>> geometric_median(torch.tensor([[0.0], [1.0], [1.0], [1.0], [900.0]])).round().tolist()
        [1.0]
    """
    point = rows.mean(dim=0)
    for _ in range(steps):
        weights = 1 / (rows - point).norm(dim=1).clamp_min(1e-12)
        moved = (rows * weights[:, None]).sum(dim=0) / weights.sum()
        shift, point = (moved - point).norm(), moved
        if shift <= 1e-6 * point.norm().clamp_min(1e-12):
            break
    return point


def fold_scale_(sae: SparseAutoencoder, scale: float) -> None:
    """Turn an SAE trained on `scale * x` into one of x: divide both biases; unit decoder rows and codes' order stay.

    (s x - b_dec) W_encᵀ + b_enc = s ((x - b_dec / s) W_encᵀ + b_enc / s), and a sparsity rule by rank picks the same
    latents; the code comes out in the units of x.
    """
    assert math.isfinite(scale) and scale > 0
    with torch.no_grad():
        sae.b_enc.div_(scale)
        sae.b_dec.div_(scale)
