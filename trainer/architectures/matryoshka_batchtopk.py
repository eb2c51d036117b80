"""Matryoshka BatchTopK: nested dictionaries, each of which must reconstruct alone. Bussmann et al. 2025, arXiv 2503.17547.

Code (section 3):      BatchTopK's, see `batchtopk`
Loss (section 3):      L = mean over prefixes m of ‖x - x̂_m‖² / variance + alpha AuxK,   x̂_m = Σ_{i < m} z_i W_dec,i + b_dec
Prefixes, fixed:       the shares 1/32, 1/16, 1/8, 1/4 and the rest of the latents, added up (dictionary_learning's)
Prefixes, random:      drawn anew in each step from a truncated Pareto distribution, the whole always among them (Nabeshima
                       2024, "Matryoshka Sparse Autoencoders")
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from trainer.architectures import batchtopk
from trainer.code import SparseCode
from trainer.losses import with_auxiliary
from trainer.sae import OPTIONS, Batch, Losses, Step

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)  # of the latents, up to the end of each group
PARETO = 0.5  # exponent of the distribution of random prefixes


@dataclass(frozen=True, config=OPTIONS)
class Matryoshka(batchtopk.BatchTopK):
    """Options.

    Args:
        prefixes: "fixed" or "random".
        n_prefixes: how many random ones.
    """

    prefixes: Literal["fixed", "random"] = "fixed"
    n_prefixes: Annotated[int, Field(ge=1, le=64)] = 5


class Sae(batchtopk.Sae):
    """Matryoshka BatchTopK SAE; see the module's first lines."""

    arch = "matryoshka_batchtopk"
    Options = Matryoshka

    def prefixes(self, step: Step) -> list[int]:
        """Return the sizes of the nested dictionaries of a step, the smallest first; the last is n_latents."""
        n = self.config.n_latents
        if self.options.prefixes == "fixed":
            return sorted({max(1, round(share * n)) for share in SHARES})
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step.number)
        drawn = torch.rand(self.options.n_prefixes - 1, generator=generator)
        sizes = n**-PARETO + drawn * (1 - n**-PARETO)  # the inverse of a Pareto distribution on [1, n]
        return sorted({*(max(1, min(n, round(float(u) ** (-1 / PARETO)))) for u in sizes), n})

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        code, sizes = self.chosen(batch, step), self.prefixes(step)
        whole = with_auxiliary(self, batch, code, step)
        errors = [self.squared_error(batch, _first(code, m), step.kernel)[0] for m in sizes[:-1]]
        reconstruction = (sum(errors) + whole.squared_error) / (len(sizes) * len(batch.x) * step.variance)
        total = reconstruction + self.config.aux_alpha * whole.auxiliary
        return whole._replace(total=total, reconstruction=reconstruction)


def _first(code: SparseCode, m: int) -> SparseCode:
    """Return the part of a code that lies in the first m latents."""
    kept = code.indices < m
    before = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
    before[1:] = kept.cumsum(0)
    return SparseCode(code.indices[kept], code.values[kept], before[code.offsets])
