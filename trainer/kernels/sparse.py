"""The sparse torch step, any device: only the encoder's forward product is dense, and it is taken in chunks of rows.

Decoder, code gradient and both weight gradients touch active latents alone, through `embedding_bag`: over latents for
the reconstruction, over rows sorted by latent for the weight gradients (../shared/research/kernels.md, section 3).
The loops are put into autograd by `fused`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.code import SparseCode, offsets_of
from trainer.kernels import fused
from trainer.kernels.auxiliary import dead_squared_error as dead_squared_error
from trainer.kernels.reference import normalize_rows_ as normalize_rows_
from trainer.kernels.reference import project_rows_ as project_rows_

SCORES = 1 << 26  # scores of a chunk: 256 MiB of float32, never the whole (batch, n_latents)
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, W_enc, b_enc) to scores (rows, n_latents)
Best = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]  # (x, W_enc, b_enc, k) to values and indices (rows, k)


def plain_product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Return x W_encᵀ + b_enc in the tensors' own precision."""
    return torch.addmm(b_enc, x, W_enc.T)


def _chunks(x: Tensor, W_enc: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, max(128, SCORES // len(W_enc)))


def best_of(product: Product, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices of the k largest scores of each row, of any sign."""
    return product(x, W_enc, b_enc).topk(k, dim=1, sorted=False)


def topk(best: Best, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices and values (batch, k) of the k largest positive scores of each row; see `fused.Loops`."""
    found = [best(part, W_enc, b_enc, k) for part in _chunks(x, W_enc)]
    values = torch.cat([v for v, _ in found]).relu_()
    return torch.cat([i for _, i in found]).masked_fill_(values == 0, 0), values


def over(product: Product, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCode:
    """Return the code of all scores over their latent's threshold; see `fused.Loops`."""
    indices, values, counts = [], [], []
    for part in _chunks(x, W_enc):
        scores = product(part, W_enc, b_enc)
        mask = scores > threshold
        indices.append(mask.nonzero()[:, 1])
        values.append(scores[mask])
        counts.append(mask.sum(1))
    return SparseCode(torch.cat(indices), torch.cat(values), offsets_of(torch.cat(counts)))


def decode_error(target: Tensor, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual, its product with each pair's decoder row, and its summed square; see `fused.Loops`."""
    with torch.enable_grad():  # embedding_bag's gradient of its weights is the product that is wanted
        values = code.values.detach().requires_grad_()
        bags = F.embedding_bag(code.indices, W_dec.detach(), code.offsets[:-1], per_sample_weights=values, mode="sum")
    residual = target - b_dec - bags.detach()
    return residual, torch.autograd.grad(bags, values, residual)[0], residual.square().sum()


def weight_gradient(code: SparseCode, factors: Tensor, source: Tensor, scale: float, out: Tensor, add: bool) -> Tensor:
    """Write each latent's weight gradient into `out`, or add it; see `fused.Loops`."""
    order, counts = torch.argsort(code.indices, stable=True), torch.bincount(code.indices, minlength=len(out))
    begins, scaled = torch.cumsum(counts, 0) - counts, factors * scale
    found = F.embedding_bag(code.rows()[order], source, begins, per_sample_weights=scaled[order], mode="sum")
    _ = out.add_(found) if add else out.copy_(found)
    return scaled.new_zeros(len(out)).index_add_(0, code.indices, scaled)


def loops_by(product: Product) -> fused.Loops:
    """Return this kernel's loops with another encoder product."""
    return fused.Loops(partial(topk, partial(best_of, product)), partial(over, product), decode_error, weight_gradient)


encode_topk, encode_over, encode_batchtopk, squared_error = fused.functions(loops_by(plain_product))
