"""The CUDA kernel: torch's products and top-k, Triton for everything that touches active latents.

In float32 the product runs in bfloat16 and proposes candidates, which the bound of `certified` proves complete and
which are scored again in float32; rows without a proof are computed in float32. One program handles a row of the batch
(decode, error, code gradient) or a latent (weight gradients, over its pairs sorted by latent): nothing is added
atomically, so a step is the same from run to run. Adam is torch's fused one.

Run by TRITON_INTERPRET=1 on a CPU, the same code is tested without a GPU.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from trainer.code import SparseCode
from trainer.kernels import fused, sparse
from trainer.kernels.auxiliary import dead_squared_error as dead_squared_error
from trainer.kernels.certified_bound import RELATIVE_RESULT, error_bound
from trainer.kernels.reference import normalize_rows_ as normalize_rows_
from trainer.kernels.reference import project_rows_ as project_rows_

CANDIDATES = 2  # scored again, in units of k
BLOCK = 4096  # columns of a row that a program holds at once
_plain = partial(sparse.best_of, sparse.plain_product)


@triton.jit
def _decode_error_kernel(target, W_dec, b_dec, indices, values, offsets, residual, squared, d, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """residual[row] = target[row] - b_dec - sum of values[p] W_dec[indices[p]]; its square over this block of columns."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    left = tl.load(target + row * d + columns, mask=inside, other=0.0) - tl.load(b_dec + columns, mask=inside, other=0.0)
    for p in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        latent = tl.load(indices + p)
        left -= tl.load(values + p) * tl.load(W_dec + latent * d + columns, mask=inside, other=0.0)
    tl.store(residual + row * d + columns, left, mask=inside)
    tl.store(squared + row * tl.num_programs(1) + part, tl.sum(left * left, 0))


@triton.jit
def _products_kernel(source, weight, indices, offsets, out, d, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """out[p] = source[row] · weight[indices[p]] for the pairs of a row."""
    row = tl.program_id(0).to(tl.int64)
    for p in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        latent = tl.load(indices + p)
        total = tl.zeros((BLOCK,), out.dtype.element_ty)
        for begin in range(0, d, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            x = tl.load(source + row * d + columns, mask=columns < d, other=0.0)
            total += x * tl.load(weight + latent * d + columns, mask=columns < d, other=0.0)
        tl.store(out + p, tl.sum(total, 0))


@triton.jit
def _weight_gradient_kernel(begins, rows, factors, source, scale, out, d, ADD: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """out[latent] (+)= scale · sum of factors[p] source[rows[p]] over the latent's pairs."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for p in range(tl.load(begins + latent), tl.load(begins + latent + 1)):
        total += tl.load(factors + p) * tl.load(source + tl.load(rows + p) * d + columns, mask=inside, other=0.0)
    total *= tl.load(scale)
    if ADD:
        total += tl.load(out + latent * d + columns, mask=inside, other=0.0)
    tl.store(out + latent * d + columns, total, mask=inside)


def _block(d: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(d)))


def _decode_error(target: Tensor, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = target.shape[1]
    parts = triton.cdiv(d, _block(d))
    residual, products = torch.empty_like(target), torch.empty_like(code.values)
    squared = target.new_empty(len(target), parts)
    _decode_error_kernel[(len(target), parts)](
        target, W_dec, b_dec, code.indices, code.values, code.offsets, residual, squared, d, BLOCK=_block(d)
    )
    _products_kernel[(len(target),)](residual, W_dec, code.indices, code.offsets, products, d, BLOCK=_block(d))
    return residual, products, squared.sum()


def _weight_gradient(code: SparseCode, factors: Tensor, source: Tensor, scale: float, out: Tensor, add: bool) -> Tensor:
    n, d = out.shape
    ordered, order = torch.sort(code.indices, stable=True)
    begins = torch.searchsorted(ordered, torch.arange(n + 1, device=out.device))
    factor = torch.tensor(scale, dtype=source.dtype, device=source.device)  # a number would be rounded to float32
    grid = (n, triton.cdiv(d, _block(d)))
    _weight_gradient_kernel[grid](begins, code.rows()[order], factors[order], source, factor, out, d, ADD=add, BLOCK=_block(d))
    sums = torch.zeros(len(factors) + 1, dtype=torch.float64, device=out.device)
    sums[1:] = factors[order].double().cumsum(0)  # by differences of running sums: no atomics here either
    return (scale * (sums[begins[1:]] - sums[begins[:-1]])).to(source.dtype)


def topk(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, k: int, bfloat16: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return indices and values (batch, k) of the k largest positive scores x W_encᵀ + b_enc; see `fused.Loops`.

    Args:
        x, W_enc, b_enc, k: as there.
        bfloat16: take candidates from a bfloat16 product; None for float32 rows.
    """
    use = x.dtype == torch.float32 if bfloat16 is None else bfloat16
    return sparse.topk(_certified if use else _plain, x, W_enc, b_enc, k)


def _certified(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `_plain`, from bfloat16 candidates; a latent that is none of them scores less than the k-th best, provably."""
    n, d = W_enc.shape
    room = min(n, CANDIDATES * k)
    low_x, low_W = x.bfloat16(), W_enc.bfloat16()
    scores = torch.addmm(b_enc.bfloat16(), low_x, low_W.T)
    rough, candidates = scores.topk(room, dim=1, sorted=False)
    offsets = torch.arange(0, room * len(x) + 1, room, device=x.device)
    products = x.new_empty(len(x), room)
    _products_kernel[(len(x),)](x, W_enc, candidates, offsets, products, d, BLOCK=_block(d))
    values, at = (products + b_enc[candidates]).topk(k, dim=1, sorted=False)
    indices = candidates.gather(1, at)
    if room < n:
        error = (W_enc - low_W).norm(dim=1).max()
        norm = W_enc.norm(dim=1).max() + error
        bound = error_bound(low_x.float().norm(dim=1), (x - low_x).norm(dim=1), norm, error, b_enc.abs().max(), d)
        worst = rough.min(dim=1).values.float()
        left = values.min(dim=1).values.relu() < worst + worst.abs() * RELATIVE_RESULT + bound
        if left.any():
            (rows,) = left.nonzero(as_tuple=True)
            values[rows], indices[rows] = _plain(x[rows], W_enc, b_enc, k)
    return values, indices


LOOPS = fused.Loops(topk, partial(sparse.over, sparse.plain_product), _decode_error, _weight_gradient)
encode_topk, encode_over, encode_batchtopk, squared_error = fused.functions(LOOPS)
