"""JumpReLU: each latent has a trained threshold of its own. Rajamanoharan et al. 2024b, arXiv 2407.14435.

Code (equation 5):    π = W_enc (x - b_dec) + b_enc,   z = π H(π - θ),   x̂ = W_decᵀ z + b_dec,   θ > 0
Loss (equation 9):    L = ‖x - x̂‖² / variance + λ ‖z‖₀ + alpha AuxK
Gradients (11, 12):   ∂z/∂θ = -(θ / ε) K((π - θ) / ε),   ∂H(π - θ)/∂θ = -(1 / ε) K((π - θ) / ε),   K(u) = 1[|u| < 1/2]
Steered to k:         (‖z‖₀ / k - 1)² in the place of λ ‖z‖₀, where no λ is given (dictionary_learning's trainer)
`penalty = "tanh"`:   λ Σ_i tanh(c z_i ‖W_dec,i‖), c = 4, in the place of λ ‖z‖₀ (Anthropic's Circuits Updates, January 2025)

Only pairs with π > θ - ε/2 are looked at: no other one has a value or a gradient. θ is kept as its logarithm.
"""

from __future__ import annotations

from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from trainer.code import SparseCode, where
from trainer.config import SaeConfig
from trainer.losses import with_auxiliary
from trainer.penalized import PenalizedSae, Penalty
from trainer.sae import OPTIONS, Batch, Losses, Step, Widths

STEEPNESS = 4.0  # c of the tanh penalty
THRESHOLD_LR = 10.0  # of Adam's rate: a logarithm moves by at most the rate in a step, too slow for fits of some thousand steps
FIRST_THRESHOLD = 1e-3  # the paper's, and the least that `first_l0` sets


@dataclass(frozen=True, config=OPTIONS)
class JumpRelu(Penalty):
    """Options, besides `Penalty`'s.

    Args:
        bandwidth: ε, in units where the median row has norm 1; the paper's value, 0.001, is for billions of rows.
        penalty: "l0" or "tanh".
        first_l0: active latents a row that the thresholds begin with, in units of k; 0 begins with 0.001, as published.
    """

    bandwidth: Annotated[float, Field(gt=0)] = 0.001
    penalty: Literal["l0", "tanh"] = "l0"
    first_l0: Annotated[float, Field(ge=0)] = 2.0


class Sae(PenalizedSae):
    """JumpReLU SAE; parameter `log_threshold` (n_latents,)."""

    arch = "jumprelu"
    lr_factors: ClassVar[dict[str, float]] = {"log_threshold": THRESHOLD_LR}
    Options = JumpRelu

    def __init__(self, config: SaeConfig, widths: Widths) -> None:
        super().__init__(config, widths)
        self.log_threshold = nn.Parameter(torch.full((config.n_latents,), FIRST_THRESHOLD).log())

    @property
    def threshold(self) -> Float[Tensor, " n_latents"]:
        """θ of each latent."""
        return self.log_threshold.exp()

    @torch.no_grad()
    def prepare_(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Set the thresholds so that each latent is active on a few rows."""
        if self.options.first_l0:
            self.log_threshold.copy_(self.first_quantiles(x).clamp_min(FIRST_THRESHOLD).log())

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the pre-activations over their thresholds."""
        return where(pre, pre > self.threshold)

    def encode_by(self, kernel: ModuleType, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the code of rows by a kernel; see SparseAutoencoder.encode_by."""
        code: SparseCode = kernel.encode_over(x, self.W_enc, self.b_enc, self.centre, self.threshold)
        return code

    def rescale_(self, factors: Float[Tensor, " n_latents"]) -> None:
        """Multiply biases and thresholds by factors."""
        super().rescale_(factors)
        self.log_threshold.add_(factors.log())

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        threshold, width = self.threshold, self.options.bandwidth
        floor = (threshold.detach() - width / 2).clamp_min(0)
        near = step.kernel.encode_over(batch.x, self.W_enc, self.b_enc, self.centre, floor)
        values, active = _Jump.apply(near.values, threshold[near.indices], width)  # type: ignore[no-untyped-call]
        code = near._replace(values=values)
        if self.options.penalty == "tanh":
            active = (STEEPNESS * values * self.decoder_norms()[near.indices]).tanh()
        l0 = active.sum() / len(batch.x)
        given = self.options.sparsity or self.options.penalty == "tanh"
        penalty = self.penalty_weight(step) * l0 if given else (l0 / self.config.k - 1).square()
        return with_auxiliary(self, batch, code, step, penalty)


class _Jump(torch.autograd.Function):
    """(π, θ of each pair, ε) to π H(π - θ) and H(π - θ), with the paper's straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Return both, (pairs,)."""
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(active, threshold, ((pre - threshold).abs() < width / 2).to(pre.dtype) / width)
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradients of π and θ."""
        active, threshold, kernel = ctx.saved_tensors
        of_value, of_active = gradients
        return of_value * active, -kernel * (threshold * of_value + of_active), None
