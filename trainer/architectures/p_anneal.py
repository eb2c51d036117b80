"""p-annealing: an Lp penalty whose p falls from 1 towards 0. Karvonen et al. 2024, arXiv 2408.00113, section 4.

Code, loss: `relu_l1`'s with unit decoder rows, and the penalty λ_p Σ_i z_i^p in the place of λ ‖z‖₁
p:          1 until `anneal_start`, then falls linearly to `last_p` at the end, in `steps_of_p` steps
λ_p:        rescaled at each change of p, so that the penalty of that batch stays what it was
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from trainer.architectures import relu_l1
from trainer.code import SparseCode
from trainer.config import SaeConfig
from trainer.sae import OPTIONS, Step, Widths

LEAST = 1e-6  # the slope of z^p has no bound at 0


@dataclass(frozen=True, config=OPTIONS)
class PAnneal(relu_l1.ReluL1):
    """Options, besides `ReluL1`'s.

    Args:
        anneal_start: share of the training after which p falls.
        last_p: p at the end.
        steps_of_p: how many values p takes.
    """

    anneal_start: Annotated[float, Field(ge=0, lt=1)] = 0.25
    last_p: Annotated[float, Field(gt=0, le=1)] = 0.2
    steps_of_p: Annotated[int, Field(ge=1, le=1000)] = 20


class Sae(relu_l1.Sae):
    """p-annealing SAE; buffer `scale` (): what the changes of p so far have multiplied λ with."""

    arch = "p_anneal"
    Options = PAnneal
    unit_norm = True

    def __init__(self, config: SaeConfig, widths: Widths) -> None:
        super().__init__(config, widths)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(1.0))

    def p(self, progress: float) -> float:
        """Return p at a share of the training."""
        done = max(0.0, (progress - self.options.anneal_start) / (1 - self.options.anneal_start))
        step = min(self.options.steps_of_p, int(done * (self.options.steps_of_p + 1)))
        return float(1 - (1 - self.options.last_p) * step / self.options.steps_of_p)

    def penalty(self, code: SparseCode, step: Step) -> Float[Tensor, ""]:
        """Return Σ z^p of the batch, rescaled."""
        return self.scale * _power_sum(code, self.p(step.progress))

    @torch.no_grad()
    def after_step_(self, code: SparseCode, step: Step) -> None:
        """Steer λ, and rescale it where the next step has another p."""
        super().after_step_(code, step)
        now, then = self.p(step.progress), self.p((step.number + 1) / self.config.steps)
        if now != then and len(code.values):
            self.scale.mul_(_power_sum(code, now) / _power_sum(code, then))


def _power_sum(code: SparseCode, p: float) -> Tensor:
    return code.values.clamp_min(LEAST).pow(p).sum()
