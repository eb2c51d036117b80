"""What the compiled kernels have in common: loops over active latents, put into autograd.

Gradients of the two weight matrices go straight into `.grad`; see `gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.code import SparseCode, of_k
from trainer.kernels.gradients import gradient_memory
from trainer.kernels.threshold import MARGIN, largest, over_guess, sampled


class Loops(NamedTuple):
    """A kernel's own loops; nothing of them is differentiable. Rows are contiguous and centred.

    Args:
        topk: (x, W_enc, b_enc, k) to indices and values (batch, k) of the k largest positive scores of each row; latent 0
            with value 0 where there are fewer.
        over: (x, W_enc, b_enc, threshold (n_latents,)) to the code of all scores over their latent's threshold.
        decode_error: (target, code, W_dec, b_dec) to the residual target - code W_dec - b_dec, the residual's product with
            each pair's decoder row (pairs,), and the summed squared residual.
        weight_gradient: (code, factors (pairs,), source (batch, d), scale, out (n_latents, d), add): write into `out`, or
            add to it, scale · the sum of factor times source row over each latent's pairs; return scale · the sum of its
            factors, (n_latents,).
    """

    topk: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    over: Callable[[Tensor, Tensor, Tensor, Tensor], SparseCode]
    decode_error: Callable[[Tensor, SparseCode, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    weight_gradient: Callable[[SparseCode, Tensor, Tensor, float, Tensor, bool], Tensor]


class _Encode(torch.autograd.Function):
    """(values of pairs already chosen, b_dec, W_enc, b_enc) to these values; the gradient stays on those pairs."""

    @staticmethod
    def forward(
        ctx: Any, loops: Loops, code: SparseCode, centred: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor
    ) -> Tensor:
        """Return the values, (pairs,)."""
        ctx.loops, ctx.code, ctx.has_b_dec = loops, code, b_dec is not None
        ctx.save_for_backward(centred, W_enc)
        return code.values.view_as(code.values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradients of b_dec and b_enc; that of W_enc is written. The rows have none."""
        centred, W_enc = ctx.saved_tensors
        out, add = gradient_memory(W_enc)
        of_b_enc = ctx.loops.weight_gradient(ctx.code, gradients[0].contiguous(), centred, 1.0, out, add)
        # b_dec enters every row alike: its gradient needs the summed code gradient only, one matrix-vector product.
        return None, None, None, -(of_b_enc @ W_enc) if ctx.has_b_dec else None, None, of_b_enc


class _SquaredError(torch.autograd.Function):
    """(values, W_dec, b_dec) to the summed squared error of the reconstruction; its gradient is found on the way."""

    @staticmethod
    def forward(
        ctx: Any, loops: Loops, values: Tensor, code: SparseCode, target: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and the residual target - code W_dec - b_dec."""
        residual, products, total = loops.decode_error(target, code, W_dec, b_dec)
        ctx.loops, ctx.code = loops, code
        ctx.save_for_backward(residual, products, W_dec)
        ctx.mark_non_differentiable(residual)
        return total, residual

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradients of the values and of b_dec; that of W_dec is written."""
        residual, products, W_dec = ctx.saved_tensors
        scale = -2 * float(gradients[0])
        if ctx.needs_input_grad[4]:  # not where the decoder is frozen
            out, add = gradient_memory(W_dec)
            ctx.loops.weight_gradient(ctx.code, ctx.code.values, residual, scale, out, add)
        return None, products * scale, None, None, None, residual.sum(0) * scale


def _centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    return (x if b_dec is None else x - b_dec).detach().contiguous()


def _encoded(loops: Loops, code: SparseCode, centred: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
    values: Tensor = _Encode.apply(loops, code, centred, b_dec, W_enc, b_enc)  # type: ignore[no-untyped-call]
    return SparseCode(code.indices, values, code.offsets)


def encode_topk(
    loops: Loops, x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int
) -> SparseCode:
    """Return the k largest pre-activations of each row, after ReLU; see `reference.encode_topk`."""
    centred = _centred(x, b_dec)
    code = of_k(*loops.topk(centred, W_enc.detach(), b_enc.detach(), k))
    values = _encoded(loops, code, centred, b_dec, W_enc, b_enc).values
    return SparseCode(code.indices, values * (code.values > 0), code.offsets)  # a pair of value 0 teaches nothing


def encode_over(
    loops: Loops, x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None,
    threshold: Float[Tensor, " n_latents"],
) -> SparseCode:  # fmt: skip
    """Return each pre-activation that is over its latent's threshold; see `reference.encode_over`."""
    centred = _centred(x, b_dec)
    code = loops.over(centred, W_enc.detach(), b_enc.detach(), threshold.detach().to(x.dtype).contiguous())
    return _encoded(loops, code, centred, b_dec, W_enc, b_enc)


def encode_batchtopk(
    loops: Loops, x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, pairs: int,
    guess: float = 0.0,
) -> SparseCode:  # fmt: skip
    """Return the `pairs` largest positive pre-activations of the batch; see `reference.encode_batchtopk`."""
    centred, weights = _centred(x, b_dec), (W_enc.detach(), b_enc.detach())
    low, threshold = MARGIN * guess if guess > 0 else sampled(centred, *weights, pairs), torch.empty_like(b_enc.detach())
    found = over_guess(lambda low: loops.over(centred, *weights, threshold.fill_(low)), low, lambda n: n >= pairs)
    return _encoded(loops, largest(found, pairs), centred, b_dec, W_enc, b_enc)


def squared_error(
    loops: Loops, target: Float[Tensor, "batch d_out"], code: SparseCode, W_dec: Tensor, b_dec: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
    """Return the summed squared error and target - reconstruction; see `reference.squared_error`."""
    values = code.values.contiguous()
    plain = SparseCode(code.indices, values.detach(), code.offsets)
    found: tuple[Tensor, Tensor] = _SquaredError.apply(  # type: ignore[no-untyped-call]
        loops, values, plain, target.detach().contiguous(), W_dec, b_dec
    )
    return found


Encode = Callable[..., SparseCode]
Error = Callable[..., tuple[Tensor, Tensor]]


def functions(loops: Loops) -> tuple[Encode, Encode, Encode, Error]:
    """Return a kernel's `encode_topk`, `encode_over`, `encode_batchtopk` and `squared_error` from its loops."""
    return tuple(partial(f, loops) for f in (encode_topk, encode_over, encode_batchtopk, squared_error))  # type: ignore[return-value]
