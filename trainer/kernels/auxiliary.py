"""AuxK at its true cost: dense products over the dead latents alone, and gradients written into their rows alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.distributed import ONE, Ranks
from trainer.kernels.gradients import gradient_memory

LATENTS = 4096  # gathered at once: their rows stay in the cache, and no copy of half a dictionary is made


class _DeadSquaredError(torch.autograd.Function):
    """See `dead_squared_error`. Four dense products of (batch, n_dead, d); their selections are few next to them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor, k: int, ranks: Ranks
    ) -> Tensor:
        """Return the summed squared error."""
        code = x.new_empty(len(x), len(dead))  # pre-activations at first
        for part, rows in _parts(dead):
            torch.addmm(b_enc[rows], x, W_enc[rows].T, out=code[:, part])
        code.masked_fill_(code < _least(code, k, ranks), 0)
        error = target.neg() if ranks.rank == 0 else torch.zeros_like(target)
        for part, rows in _parts(dead):
            error.addmm_(code[:, part], W_dec[rows])
        ranks.sum_(error, "AuxK's reconstruction")
        ctx.save_for_backward(x, W_enc, W_dec, dead, code, error)
        return error.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradient of b_enc; those of the weight matrices are written."""
        x, W_enc, W_dec, dead, code, error = ctx.saved_tensors
        scaled = error * (2 * gradients[0])
        of_decoder, of_encoder = _to_add_to(W_dec), _to_add_to(W_enc)
        of_bias = torch.zeros(len(W_enc), dtype=x.dtype, device=x.device)
        for part, rows in _parts(dead):
            active = code[:, part]
            of_code = (scaled @ W_dec[rows].T).mul_(active > 0)
            of_decoder.index_add_(0, rows, active.T @ scaled)
            of_encoder.index_add_(0, rows, of_code.T @ x)
            of_bias.index_copy_(0, rows, of_code.sum(0))
        return None, None, None, of_bias, None, None, None, None


def _least(code: Tensor, k: int, ranks: Ranks) -> Tensor:
    """Return each row's k-th largest score over all ranks, (rows, 1), at least 0."""
    if ranks.world == 1:
        return code.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True).clamp_min(0)
    best = code.topk(min(k, code.shape[1]), dim=1).values
    candidates = torch.cat(ranks.gather(F.pad(best, (0, k - best.shape[1])), "AuxK's candidates"), dim=1)
    return candidates.topk(k, dim=1).values[:, -1:].clamp_min(0)


def _parts(dead: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, len(dead), LATENTS):
        yield slice(begin, begin + LATENTS), dead[begin : begin + LATENTS]


def _to_add_to(weight: Tensor) -> Tensor:
    """Return the weight's gradient, zero where it holds none."""
    out, holds = gradient_memory(weight)
    return out if holds else out.zero_()


def dead_squared_error(
    x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], W_enc: Tensor, b_enc: Tensor, W_dec: Tensor,
    dead: Int[Tensor, " n_dead"], k: int, ranks: Ranks = ONE,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the summed squared error of reconstructing from dead latents alone; see `reference.dead_squared_error`.

    Where several scores of a row equal its k-th largest, all of them count. With `ranks` the latents are spread over
    them, and k is at most the number of all dead ones.
    """
    k = min(k, len(dead)) if ranks.world == 1 else k
    found: Tensor = _DeadSquaredError.apply(x, target, W_enc, b_enc, W_dec, dead, k, ranks)  # type: ignore[no-untyped-call]
    return found
