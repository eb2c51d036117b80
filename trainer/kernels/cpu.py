"""The CPU kernel: one dense product, everything else compiled loops over active latents; weights float32 or float64.

On a CPU with bfloat16 instructions the product runs in bfloat16 and only proposes candidates, which `certified` proves
complete and scores again; elsewhere it is a float32 product. Either way the k largest float32 scores are chosen.

The loops are put into autograd by `fused`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trainer.code import SparseCode, offsets_of
from trainer.kernels import certified, compiled, compiled_topk, fused
from trainer.kernels.auxiliary import dead_squared_error as dead_squared_error
from trainer.kernels.certified_bound import error_bound

SCORES = 2 << 20  # scores of a chunk: 8 MiB of float32 stay in the cache until they are looked through
CANDIDATES = 8  # room for candidates of a row, in units of k


@functools.cache
def has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 numbers by instructions of its own (avx512_bf16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def _chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, scores) of chunks of rows; the scores are used up before the next chunk."""
    size = min(len(x), max(64, SCORES // len(W_enc)))
    product = _onednn if x.dtype == torch.float32 else torch.nn.functional.linear
    for first in range(0, len(x), size):
        yield first, product(x[first : first + size], W_enc, b_enc)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x weightᵀ + bias by oneDNN, which on a CPU is as fast as MKL or faster; by torch's own choice without it."""
    try:
        scores: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError):  # a build without oneDNN, or with another signature: the operator is private
        return torch.nn.functional.linear(x, weight, bias)
    return scores


@functools.lru_cache(8)
def _scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory that is used again in each step."""
    return torch.empty(shape, dtype=dtype)


def topk(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, k: int, bfloat16: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return indices and values (batch, k) of the k largest positive scores x W_encᵀ + b_enc; not differentiable.

    Args:
        x: centred rows.
        W_enc: (n_latents, d_in).
        b_enc: (n_latents,).
        k: 1 to n_latents; where fewer scores are positive, the rest is latent 0 with value 0.
        bfloat16: take candidates from a bfloat16 product; None where the CPU has instructions for it.
    """
    indices, values = torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k, dtype=x.dtype)
    use = has_bfloat16() if bfloat16 is None else bfloat16
    if use and x.dtype == torch.float32:
        _certified_topk(x, W_enc, b_enc, k, indices, values)
    else:
        for first, scores in _chunks(x, W_enc, b_enc):
            part = slice(first, first + len(scores))
            compiled_topk.topk_rows(scores.numpy(), k, indices[part].numpy(), values[part].numpy())
    return indices, values


def _certified_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, indices: Tensor, values: Tensor) -> int:
    """Fill indices and values from certified candidates; return how many rows had to be computed in float32."""
    rounded, norms, errors = _round(x, "x")
    W_rounded, W_norms, W_errors = _round(W_enc, "W_enc")
    weight_error, bias = float(W_errors.max()), float(b_enc.abs().max())
    bound = error_bound(norms.numpy(), errors.numpy(), float(W_norms.max()) + weight_error, weight_error, bias, x.shape[1])
    slack = (2 * bound).astype(np.float32)
    chosen = _scratch("candidates", (len(x), CANDIDATES * k + 64), torch.int32).numpy()
    counts = np.empty(len(x), np.int64)
    size = min(len(x), max(64, 2 * SCORES // len(W_enc)))
    for first in range(0, len(x), size):
        part = slice(first, min(len(x), first + size))
        scores = torch.nn.functional.linear(rounded[part], W_rounded, b_enc.bfloat16())
        certified.candidates(scores.view(torch.int16).numpy(), k, slack[part], chosen[part], counts[part])
    certified.score_again(x.numpy(), W_enc.numpy(), b_enc.numpy(), k, chosen, counts, indices.numpy(), values.numpy())
    left = np.flatnonzero(counts < 0)
    if len(left):
        rows = torch.from_numpy(left)
        indices[rows], values[rows] = topk(x[rows], W_enc, b_enc, k, bfloat16=False)
    return len(left)


def _round(rows: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (n, d) rows in bfloat16, their norms, and the norms of what rounding took."""
    rounded = _scratch(name, tuple(rows.shape), torch.bfloat16)
    norms, errors = torch.empty(len(rows)), torch.empty(len(rows))
    bits = rows.view(torch.int32).numpy().view(np.uint32)
    certified.round_rows(rows.numpy(), bits, rounded.view(torch.int16).numpy().view(np.uint16), norms.numpy(), errors.numpy())
    return rounded, norms, errors


def _over(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCode:
    parts, limits = [], threshold.numpy()
    for _, scores in _chunks(x, W_enc, b_enc):
        counts = torch.empty(len(scores), dtype=torch.int64)
        compiled_topk.count_over(scores.numpy(), limits, counts.numpy())
        offsets = offsets_of(counts)
        indices, values = torch.empty(int(offsets[-1]), dtype=torch.int64), torch.empty(int(offsets[-1]), dtype=x.dtype)
        compiled_topk.take_over(scores.numpy(), limits, offsets.numpy(), indices.numpy(), values.numpy())
        parts.append((indices, values, counts))
    indices, values, counts = map(torch.cat, zip(*parts, strict=True))
    return SparseCode(indices, values, offsets_of(counts))


def _decode_error(target: Tensor, code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    residual, squared = torch.empty_like(target), torch.empty(len(target), dtype=target.dtype)
    products = torch.empty_like(code.values)
    arrays = (t.numpy() for t in (target, W_dec, b_dec, code.indices, code.values, code.offsets, residual, products, squared))
    compiled.decode_error(*arrays)
    return residual, products, squared.sum()


def _weight_gradient(code: SparseCode, factors: Tensor, source: Tensor, scale: float, out: Tensor, add: bool) -> Tensor:
    n, pairs = len(out), len(code.indices)
    begins, rows = np.empty(n + 1, np.int64), np.empty(pairs, np.int64)
    ordered, sums = torch.empty(pairs, dtype=source.dtype).numpy(), torch.empty(n, dtype=source.dtype)
    compiled.by_latent(code.indices.numpy(), code.offsets.numpy(), factors.numpy(), begins, rows, ordered)
    factor = source.numpy().dtype.type(scale)
    compiled.weight_gradient(begins, rows, ordered, source.numpy(), factor, add, out.numpy(), sums.numpy())
    return sums


LOOPS = fused.Loops(topk, _over, _decode_error, _weight_gradient)
encode_topk, encode_over, encode_batchtopk, squared_error = fused.functions(LOOPS)


@torch.no_grad()
def project_rows_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> float:
    """Remove the part along each unit row and return the norm of what is left; see `reference.project_rows_`."""
    squares = np.empty(compiled.TASKS)
    compiled.project_rows(gradient.numpy(), rows.numpy(), squares)
    return float(np.sqrt(squares.sum()))


@torch.no_grad()
def normalize_rows_(rows: Float[Tensor, "n d"]) -> None:
    """Scale each row to Euclidean norm 1; see `reference.normalize_rows_`."""
    compiled.normalize_rows(rows.numpy(), torch.finfo(rows.dtype).tiny)
