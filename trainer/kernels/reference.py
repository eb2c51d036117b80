"""The plain step: dense products and torch autograd. Any device, any dtype; what other kernels are measured against."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.sae import SparseAutoencoder, SparseCode


def encode_topk(sae: SparseAutoencoder, x: Float[Tensor, "batch d_model"], k: int) -> SparseCode:
    """Return the k largest pre-activations of each row, after ReLU."""
    values, indices = sae.pre_activations(x).topk(k, dim=1, sorted=False)
    return SparseCode(indices, values.relu())


def decode(sae: SparseAutoencoder, code: SparseCode) -> Float[Tensor, "batch d_model"]:
    """Return the reconstruction through the dense code."""
    dense = torch.zeros(len(code.indices), sae.config.n_latents, dtype=code.values.dtype, device=code.values.device)
    return sae.decode(dense.scatter(1, code.indices, code.values))
