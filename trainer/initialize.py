"""What an SAE begins with: its weights from a seed, its centre from a sample of the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainer.config import Centre
from trainer.kernels.reference import normalize_rows_
from trainer.sae import Batch, SparseAutoencoder

LATENTS_AT_ONCE = 1024
MASSIVE = 10.0  # a row is massive from so many median norms on
SAME_DIRECTION = 0.7  # cosine
MOST_MASSIVE = 8


@torch.no_grad()
def initialize_(sae: SparseAutoencoder, centre: Float[Tensor, " d_out"], centre_in: Float[Tensor, " d_in"] | None = None) -> None:
    """Set the initial parameters from the configuration's seed.

    Decoder rows are random directions of norm 1, the encoder is the decoder, biases are zero, `b_dec` is the centre of
    the data: Gao et al. 2024 (arXiv 2406.04093), appendix A.1. A transcoder's decoder is drawn apart, because its encoder
    reads other rows, and begins small, as the rows' own scale is 1.

    Args:
        sae: written.
        centre: of the rows to reconstruct.
        centre_in: of the rows to encode, for a transcoder.
    """
    generator = torch.Generator().manual_seed(sae.config.seed)
    sae.W_dec.copy_(_drawn(sae, sae.widths.d_out, generator))
    normalize_rows_(sae.W_dec)
    if centre_in is None:
        sae.W_enc.copy_(sae.W_dec)
    else:
        sae.W_enc.copy_(_drawn(sae, sae.widths.d_in, generator))
        normalize_rows_(sae.W_enc)
        sae.get_buffer("b_in").copy_(centre_in)
    sae.b_enc.zero_()
    sae.b_dec.copy_(centre)


def _drawn(sae: SparseAutoencoder, width: int, generator: torch.Generator) -> Tensor:
    """Return the rows of this process's latents of one draw of (n_latents, width) numbers; no more of it is in memory."""
    n, mine = sae.config.n_latents, sae.latents
    if len(mine) == n:
        return torch.randn((n, width), generator=generator)
    found, first = torch.empty(len(mine), width), 0
    while first < n:  # parts of one generator's draw equal the whole as long as each has 16 numbers or more
        count = LATENTS_AT_ONCE if n - first >= LATENTS_AT_ONCE + 16 else n - first
        part = torch.randn((count, width), generator=generator)
        begin, end = max(first, mine.start), min(first + count, mine.stop)
        if begin < end:
            found[begin - mine.start : end - mine.start] = part[begin - first : end - first]
        first += count
    return found


@torch.no_grad()
def give_massive_rows_latents_(sae: SparseAutoencoder, sample: Batch) -> int:
    """Let one latent point along each direction of massive rows, and all others across it; return how many there are.

    Some models have a few rows (attention sinks, early positions) hundreds of times longer than the rest, almost all
    along one direction. By random directions such a row is a sum of k latents that never quite adds up: with TopK on
    SmolLM2-135M it is a fifth of the whole squared error (docs/lab-log.md). With a latent of its own it is exact from the
    first step, and the other latents never meet it.

    Args:
        sae: initialised; changed.
        sample: normalised rows.
    """
    x, y, first = sample.x - sae.centre, sample.y - sae.b_dec, sae.latents.start
    long, found = MASSIVE * x.norm(dim=1).median(), 0
    while (norms := x.norm(dim=1)).max() > long and found < min(MOST_MASSIVE, sae.config.n_latents // 2):
        mine = (norms > long) & (F.cosine_similarity(x, x[norms.argmax()][None], dim=1) > SAME_DIRECTION)
        read, write = F.normalize(x[mine].sum(0), dim=0), F.normalize(y[mine].sum(0), dim=0)
        gain = (y[mine] @ write).sum() / (x[mine] @ read).sum()
        for weight, direction in ((sae.W_enc, read), (sae.W_dec, write)):
            others = weight[max(0, found + 1 - first) :]
            others.addr_(others @ direction, direction, alpha=-1)
            normalize_rows_(others)
        if found in sae.latents:
            sae.W_enc[found - first], sae.W_dec[found - first] = gain * read, write
        active = (x @ read).relu()  # the next direction is one of what this latent leaves
        x, y = x - active[:, None] * read, y - gain * active[:, None] * write
        found += 1
    return found


def centre_of(rows: Float[Tensor, "n d_model"], kind: Centre) -> Float[Tensor, " d_model"]:
    """Return the centre of rows: their geometric median, their mean, or zero.

    Example:
        >>> centre_of(torch.tensor([[0.0], [4.0]]), "mean")
        tensor([2.])
    """
    if kind == "median":
        return geometric_median(rows)
    return rows.mean(dim=0) if kind == "mean" else torch.zeros_like(rows[0])


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


@torch.no_grad()
def quantile_pre_activations(sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"], share: float) -> Float[Tensor, " n_latents"]:
    """Return for each latent the pre-activation that a share of the rows is over, at least 0.

    Where a fixed threshold would leave half of the latents active on every row at first, this one begins near the wanted
    sparsity. Source: the bias initialisation of Anthropic's Circuits Updates, January 2025.

    Args:
        sae: initialised.
        x: a sample of rows.
        share: of the rows, 0 to 1.
    """
    rank = min(len(x), max(1, round(share * len(x))))
    centred, found = x - sae.centre, []
    for first in range(0, len(sae.W_enc), LATENTS_AT_ONCE):
        rows = slice(first, first + LATENTS_AT_ONCE)
        pre = torch.addmm(sae.b_enc[rows], centred, sae.W_enc[rows].T)
        found.append(pre.kthvalue(len(x) - rank + 1, dim=0).values)
    return torch.cat(found).clamp_min(0)
