"""Rows in units a dictionary learns well in, and a trained SAE put back into the units of the store.

    x_n = (x - shift) scale

`median` (the default): scale 1 / median norm of a sample, so that massive rows do not decide it. `mean-norm`:
√d / mean norm (Templeton et al. 2024, "Scaling Monosemanticity"; SAELens's expected_average_only_in). `dimension`: every
dimension by its own mean and standard deviation. `none`: rows as they are. Each store has its own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from actstore.errors import UsageError
from actstore.reader import Store
from trainer.config import Normalize
from trainer.sae import SparseAutoencoder


class Normalization(NamedTuple):
    """(x - shift) scale; both (d,)."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]

    @property
    def factor(self) -> float | None:
        """The one number that all of it is, or None."""
        same = bool((self.scale == self.scale[0]).all()) and not bool(self.shift.any())
        return float(self.scale[0]) if same else None


def joined_normalization(parts: Sequence[Normalization]) -> Normalization:
    """Return the normalisation of several stores' rows side by side.

    Example:
        >>> one, two = (Normalization(torch.full((n,), float(n)), torch.zeros(n)) for n in (1, 2))
        >>> joined_normalization([one, two]).scale.tolist()
        [1.0, 2.0, 2.0]
    """
    return Normalization(torch.cat([p.scale for p in parts]), torch.cat([p.shift for p in parts]))


def normalization(store: Store, sample: Float[Tensor, "rows d"], kind: Normalize) -> Normalization:
    """Return the normalisation of one store's rows.

    Args:
        store: gives the mean norm of all its rows.
        sample: (rows, d) of it.
        kind: see the module's first lines.

    Raises: UsageError: half of the rows are zero.
    """
    one, zero = torch.ones_like(sample[0]), torch.zeros_like(sample[0])
    middle = float(sample.norm(dim=1).median())
    if middle == 0:
        raise UsageError("half of the rows are zero: there is nothing to learn", f"store {store.digest[:12]}")
    if kind == "median":
        return Normalization(one / middle, zero)
    if kind == "mean-norm":
        return Normalization(one * (math.sqrt(len(one)) / store.statistics.mean_norm), zero)
    if kind == "dimension":
        spread = sample.std(dim=0)
        return Normalization(1 / spread.clamp_min(1e-6 * float(spread.max())), sample.mean(dim=0))
    return Normalization(one, zero)


@torch.no_grad()
def fold_(sae: SparseAutoencoder, of_input: Normalization, of_target: Normalization) -> None:
    """Turn an SAE of normalised rows into one of the rows themselves.

    W_enc takes the input's scale, W_dec the target's inverse, and what this leaves of the decoder's norm goes into the
    code: of each latent alone where it has its own threshold, else all by one factor, since a rule by rank must see the
    same order. One factor for all rows leaves both matrices as they are:
    (s x - b_dec) W_encᵀ + b_enc = s ((x - b_dec / s) W_encᵀ + b_enc / s).

    Args:
        sae: changed.
        of_input: of the rows it encodes.
        of_target: of the rows it reconstructs.
    """
    factor = of_input.factor
    if factor is not None and of_target.factor == factor:
        assert math.isfinite(factor) and factor > 0
        sae.rescale_(torch.full_like(sae.b_enc, 1 / factor))
    else:
        sae.W_enc.mul_(of_input.scale)
        sae.W_dec.div_(of_target.scale)
    sae.b_dec.div_(of_target.scale).add_(of_target.shift)
    if sae.widths.targets is not None:
        sae.get_buffer("b_in").div_(of_input.scale).add_(of_input.shift)
    elif not sae.centred:
        sae.b_enc.sub_(sae.W_enc @ of_input.shift)  # one factor has no shift
    if sae.config.skip:
        sae.W_skip.mul_(of_input.scale).div_(of_target.scale[:, None])
    norms = sae.W_dec.norm(dim=1).clamp_min(torch.finfo(sae.W_dec.dtype).tiny)
    if sae.by_threshold and not sae.unit_norm:
        rescale_code_(sae, norms)
    elif factor is None or of_target.factor != factor:
        rescale_code_(sae, norms if sae.by_threshold else _mean(norms, sae).expand_as(norms))


def _mean(norms: Tensor, sae: SparseAutoencoder) -> Tensor:
    """Return the mean over all latents."""
    ranks = sae.mesh.latents
    return norms.mean() if ranks.world == 1 else ranks.sum_(norms.sum(), "the mean norm") / sae.config.n_latents


@torch.no_grad()
def rescale_code_(sae: SparseAutoencoder, factors: Float[Tensor, " n_latents"]) -> None:
    """Multiply each latent's activation by a factor and divide its decoder row by it: the reconstruction stays."""
    sae.W_enc.mul_(factors[:, None])
    sae.W_dec.div_(factors[:, None])
    sae.rescale_(factors)
