"""What SAEs with a sparsity penalty share: its weight, given or found while training so that L0 becomes k."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from trainer.code import SparseCode
from trainer.config import SaeConfig
from trainer.initialize import quantile_pre_activations
from trainer.sae import OPTIONS, SparseAutoencoder, Step, Widths

FIRST_WEIGHT = 1e-3  # of a penalty that is steered: in units of the loss, where the variance is 1
LIMITS = (1e-9, 1e6)
FASTEST, REACTIONS = 0.005, 40.0  # change of its logarithm a step: at most e^40 over a fit, and never slower than the first
TREND = 2.0  # how much a step's deviation from the averaged L0 counts
AVERAGED = 0.1  # share of the newest step in the averaged L0


@dataclass(frozen=True, config=OPTIONS)
class Penalty:
    """Options of a sparsity penalty.

    Args:
        sparsity: its weight λ; 0 is "steered": found while training, so that L0 becomes k.
        sparsity_warmup: share of the training over which a given λ rises linearly from 0 (Anthropic's April 2024 update).
    """

    sparsity: Annotated[float, Field(ge=0)] = 0.0
    sparsity_warmup: Annotated[float, Field(ge=0, le=1)] = 0.05


class PenalizedSae(SparseAutoencoder):
    """An SAE whose sparsity comes from a penalty; buffers `weight` (the λ in use) and `mean_l0`, both of shape ()."""

    Options: ClassVar[Any] = Penalty
    by_threshold = True

    def __init__(self, config: SaeConfig, widths: Widths) -> None:
        super().__init__(config, widths)
        self.weight: Tensor
        self.mean_l0: Tensor
        self.register_buffer("weight", torch.tensor(self.options.sparsity or FIRST_WEIGHT))
        self.register_buffer("mean_l0", torch.tensor(0.0))

    def first_quantiles(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, " n_latents"]:
        """Return the pre-activations over which `first_l0` times k latents are active on a row of a sample."""
        share = min(0.5, self.options.first_l0 * self.config.k / self.config.n_latents)
        return quantile_pre_activations(self, x, share)

    def penalty_weight(self, step: Step) -> Tensor | float:
        """Return λ for a step."""
        given, warmup = self.options.sparsity, self.options.sparsity_warmup
        if not given:
            return self.weight
        return float(given) * (min(1.0, step.progress / warmup) if warmup else 1.0)

    @torch.no_grad()
    def after_step_(self, code: SparseCode, step: Step) -> None:
        """Steer λ: its logarithm follows the logarithm of (L0 / k), as an integral controller does."""
        l0 = float((code.values != 0).sum()) / code.batch
        mean = l0 if step.number == 0 else (1 - AVERAGED) * float(self.mean_l0) + AVERAGED * l0
        self.mean_l0.fill_(mean)
        if self.options.sparsity:
            return
        # Both the level and its trend count: with the level alone λ swings around the value it looks for.
        error = math.log(max(mean, 1e-3) / self.config.k) + TREND * math.log(max(l0, 1e-3) / max(mean, 1e-3))
        change = max(FASTEST, REACTIONS / self.config.steps) * max(-1.0, min(1.0, error))
        self.weight.mul_(math.exp(change)).clamp_(*LIMITS)
