"""The sparse torch step, any device: only the encoder's forward product is dense.

Decoder, code gradient and both weight gradients touch active latents alone, through `embedding_bag`: over latents for
the reconstruction, over rows sorted by latent for the weight gradients (research/kernels.md, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.sae import SparseAutoencoder, SparseCode


class _Transposed:
    """The (row, latent) pairs of a code, sorted by latent, as bags of rows for `embedding_bag`."""

    def __init__(self, indices: Int[Tensor, "batch k"], n_latents: int) -> None:
        flat = indices.flatten()
        self.order = torch.argsort(flat, stable=True)
        self.rows = torch.div(self.order, indices.shape[1], rounding_mode="floor")
        counts = torch.bincount(flat, minlength=n_latents)
        self.offsets = torch.cumsum(counts, 0) - counts  # where each latent's bag begins

    def weight_gradient(self, x: Float[Tensor, "batch d_model"], weights: Float[Tensor, "batch k"]) -> Float[Tensor, "n d_model"]:
        """Return sum over pairs of weight times row, for each latent: (n_latents, d_model)."""
        return F.embedding_bag(self.rows, x, self.offsets, per_sample_weights=weights.flatten()[self.order], mode="sum")


class _EncodeTopK(torch.autograd.Function):
    """(x, b_dec, W_enc, b_enc) to the values of the k largest pre-activations; the gradient stays on those pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return values and indices, each (batch, k)."""
        centred = x - b_dec
        values, indices = torch.addmm(b_enc, centred, W_enc.T).topk(k, dim=1, sorted=False)
        values = values.relu()
        ctx.save_for_backward(centred, W_enc, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor, Tensor, Tensor, None]:
        """Return the gradients of b_dec, W_enc and b_enc; rows and k have none."""
        centred, W_enc, indices, values = ctx.saved_tensors
        gradient = gradients[0] * (values > 0)
        of_W = _Transposed(indices, len(W_enc)).weight_gradient(centred, gradient)
        of_b = torch.zeros(len(W_enc), dtype=gradient.dtype, device=gradient.device)
        of_b.index_add_(0, indices.flatten(), gradient.flatten())
        # b_dec enters every row alike, so its gradient needs the summed code gradient only: one matrix-vector product.
        return None, -(of_b @ W_enc), of_W, of_b, None


class _Decode(torch.autograd.Function):
    """(values, indices, W_dec) to values W_dec, summed over the active latents of each row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """Return the weighted sums, (batch, d_model)."""
        ctx.save_for_backward(values, indices, W_dec)
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor]:
        """Return the gradients of the values and of W_dec."""
        values, indices, W_dec = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_W = _Transposed(indices, len(W_dec)).weight_gradient(gradient, values)
        return _row_products(gradient, W_dec, indices), None, of_W


def _row_products(gradient: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    """Return gradient[b] · W_dec[indices[b, j]] as (batch, k): the gradient of embedding_bag's per-sample weights."""
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        bags = F.embedding_bag(indices, W_dec.detach(), per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(bags, weights, gradient)[0]


def encode_topk(sae: SparseAutoencoder, x: Float[Tensor, "batch d_model"], k: int) -> SparseCode:
    """Return the k largest pre-activations of each row, after ReLU; see `reference.encode_topk`."""
    values, indices = _EncodeTopK.apply(x, sae.b_dec, sae.W_enc, sae.b_enc, k)  # type: ignore[no-untyped-call]
    return SparseCode(indices, values)


def decode(sae: SparseAutoencoder, code: SparseCode) -> Float[Tensor, "batch d_model"]:
    """Return the reconstruction, touching active latents only; see `reference.decode`."""
    decoded: Tensor = _Decode.apply(code.values, code.indices, sae.W_dec)  # type: ignore[no-untyped-call]
    return decoded + sae.b_dec
