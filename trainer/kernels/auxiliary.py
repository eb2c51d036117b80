"""AuxK at its true cost: dense products over the dead latents alone, and gradients written into their rows alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.kernels.gradients import gradient_memory


class _DeadSquaredError(torch.autograd.Function):
    """See `dead_squared_error`. Four dense products of (batch, n_dead, d); their selections are few next to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor, k: int) -> Tensor:
        """Return the summed squared error."""
        decoder = W_dec[dead]
        pre = torch.addmm(b_enc[dead], x, W_enc[dead].T)  # (batch, n_dead)
        least = pre.topk(k, dim=1).values[:, -1:]
        code = torch.where(pre >= least, pre, 0.0).relu_()
        error = torch.addmm(target, code, decoder, beta=-1)
        ctx.save_for_backward(x, W_enc, W_dec, dead, decoder, code, error)
        return error.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradient of b_enc; those of the weight matrices are written."""
        x, W_enc, W_dec, dead, decoder, code, error = ctx.saved_tensors
        scaled = error * (2 * gradients[0])
        of_code = (scaled @ decoder.T).mul_(code > 0)
        _add(W_dec, dead, code.T @ scaled)
        _add(W_enc, dead, of_code.T @ x)
        of_bias = torch.zeros(len(W_enc), dtype=x.dtype, device=x.device).index_copy_(0, dead, of_code.sum(0))
        return None, None, None, of_bias, None, None, None


def _add(weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
    out, add = gradient_memory(weight)
    if not add:
        out.zero_()
    out.index_add_(0, rows, gradient)


def dead_squared_error(
    x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], W_enc: Tensor, b_enc: Tensor, W_dec: Tensor,
    dead: Int[Tensor, " n_dead"], k: int,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the summed squared error of reconstructing from dead latents alone; see `reference.dead_squared_error`.

    Where several scores of a row equal its k-th largest, all of them count.
    """
    found: Tensor = _DeadSquaredError.apply(x, target, W_enc, b_enc, W_dec, dead, min(k, len(dead)))  # type: ignore[no-untyped-call]
    return found
