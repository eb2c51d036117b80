"""The sparse torch step, any device: only the encoder's forward product is dense, and it is taken in chunks of rows.

Decoder, code gradient and both weight gradients touch active latents alone, through `embedding_bag`: over latents for
the reconstruction, over rows sorted by latent for the weight gradients (../shared/research/kernels.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainer.code import SparseCode, of_k
from trainer.kernels.auxiliary import dead_squared_error as dead_squared_error
from trainer.kernels.reference import normalize_rows_ as normalize_rows_
from trainer.kernels.reference import project_rows_ as project_rows_
from trainer.kernels.threshold import largest, over_guess

SCORES = 1 << 26  # scores of a chunk: 256 MiB of float32, never the whole (batch, n_latents)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, W_enc, b_enc) to scores (rows, n_latents)


def plain_product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Return x W_encᵀ + b_enc in the tensors' own precision."""
    return torch.addmm(b_enc, x, W_enc.T)


def _chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor, product: Product) -> Iterator[Tensor]:
    rows = max(128, SCORES // len(W_enc))
    for first in range(0, len(x), rows):
        yield product(x[first : first + rows], W_enc, b_enc)


def weight_gradient(code: SparseCode, factors: Tensor, source: Tensor, n_latents: int) -> Tensor:
    """Return for each latent the sum of factor times source row over its pairs, (n_latents, d)."""
    order = torch.argsort(code.indices, stable=True)
    counts = torch.bincount(code.indices, minlength=n_latents)
    begins = torch.cumsum(counts, 0) - counts
    return F.embedding_bag(code.rows()[order], source, begins, per_sample_weights=factors[order], mode="sum")


class _Encode(torch.autograd.Function):
    """(pairs already chosen, b_dec, W_enc, b_enc) to their values; the gradient stays on those pairs."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, code: SparseCode, centred: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor
    ) -> Tensor:
        """Return the values, (pairs,)."""
        ctx.code, ctx.has_b_dec = code, b_dec is not None
        ctx.save_for_backward(centred, W_enc)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradients of b_dec, W_enc and b_enc; the rows have none."""
        centred, W_enc = ctx.saved_tensors
        of_W = weight_gradient(ctx.code, gradients[0], centred, len(W_enc))
        of_b = torch.zeros(len(W_enc), dtype=centred.dtype, device=centred.device)
        of_b.index_add_(0, ctx.code.indices, gradients[0])
        # b_dec enters every row alike, so its gradient needs the summed code gradient only: one matrix-vector product.
        return None, None, None, -(of_b @ W_enc) if ctx.has_b_dec else None, of_W, of_b


class _Decode(torch.autograd.Function):
    """(values, W_dec) to values W_dec, summed over the active latents of each row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, code: SparseCode, W_dec: Tensor) -> Tensor:
        """Return the weighted sums, (batch, d_out)."""
        ctx.code = code
        ctx.save_for_backward(values, W_dec)
        return F.embedding_bag(code.indices, W_dec, code.offsets[:-1], per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor]:
        """Return the gradients of the values and of W_dec."""
        values, W_dec = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return _row_products(gradient, W_dec, ctx.code), None, weight_gradient(ctx.code, values, gradient, len(W_dec))


def _row_products(gradient: Tensor, W_dec: Tensor, code: SparseCode) -> Tensor:
    """Return gradient[row] · W_dec[latent] of each pair: the gradient of embedding_bag's per-sample weights."""
    with torch.enable_grad():
        weights = torch.zeros(code.indices.shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        bags = F.embedding_bag(code.indices, W_dec.detach(), code.offsets[:-1], per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(bags, weights, gradient)[0]


def _encoded(code: SparseCode, centred: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
    values: Tensor = _Encode.apply(code.values, code, centred, b_dec, W_enc, b_enc)  # type: ignore[no-untyped-call]
    return SparseCode(code.indices, values, code.offsets)


def _centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    return (x if b_dec is None else x - b_dec).detach().contiguous()


def encode_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int, product: Product = plain_product
) -> SparseCode:
    """Return the k largest pre-activations of each row, after ReLU; see `reference.encode_topk`."""
    centred = _centred(x, b_dec)
    found = [scores.topk(k, dim=1, sorted=False) for scores in _chunks(centred, W_enc.detach(), b_enc.detach(), product)]
    values = torch.cat([f.values for f in found]).relu_()
    indices = torch.cat([f.indices for f in found]).masked_fill_(values == 0, 0)  # such a pair teaches nothing
    return _active(of_k(indices, values), centred, b_dec, W_enc, b_enc)


def _active(code: SparseCode, centred: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
    """Attach the encoder to a code after ReLU: pairs of value 0 have no gradient."""
    attached = _encoded(code, centred, b_dec, W_enc, b_enc)
    return SparseCode(attached.indices, attached.values * (code.values > 0), attached.offsets)


def encode_over(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, threshold: Float[Tensor, " n_latents"],
    product: Product = plain_product,
) -> SparseCode:  # fmt: skip
    """Return each pre-activation that is over its latent's threshold; see `reference.encode_over`."""
    centred = _centred(x, b_dec)
    return _encoded(over(centred, W_enc.detach(), b_enc.detach(), threshold, product), centred, b_dec, W_enc, b_enc)


def over(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, product: Product) -> SparseCode:
    """Return the code of all scores of centred rows that are over the threshold; not differentiable."""
    indices, values, counts = [], [], []
    for scores in _chunks(x, W_enc, b_enc, product):
        mask = scores > threshold
        indices.append(mask.nonzero()[:, 1])
        values.append(scores[mask])
        counts.append(mask.sum(1))
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    offsets[1:] = torch.cat(counts).cumsum(0)
    return SparseCode(torch.cat(indices), torch.cat(values), offsets)


def encode_batchtopk(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, pairs: int, guess: float = 0.0,
    product: Product = plain_product,
) -> SparseCode:  # fmt: skip
    """Return the `pairs` largest positive pre-activations of the batch; see `reference.encode_batchtopk`."""
    centred, weights = _centred(x, b_dec), (W_enc.detach(), b_enc.detach())
    found = over_guess(lambda low: over(centred, *weights, low, product), centred, *weights, pairs, guess)
    return _encoded(largest(found, pairs), centred, b_dec, W_enc, b_enc)


def squared_error(
    target: Float[Tensor, "batch d_out"], code: SparseCode, W_dec: Tensor, b_dec: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
    """Return the summed squared error and target - reconstruction; see `reference.squared_error`."""
    plain = SparseCode(code.indices, code.values.detach(), code.offsets)
    decoded: Tensor = _Decode.apply(code.values, plain, W_dec)  # type: ignore[no-untyped-call]
    residual = target - b_dec - decoded
    return residual.square().sum(), residual.detach()
