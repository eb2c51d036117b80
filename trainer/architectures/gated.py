"""Gated: a gate says which latents are active, a magnitude how strongly. Rajamanoharan et al. 2024a, arXiv 2404.16014.

Code (section 3.2):  π = W_enc (x - b_dec) + b_enc,   x̂ = W_decᵀ z + b_dec
                     z = 1[π > 0] ReLU(exp(r_mag) W_enc (x - b_dec) + b_mag)
Loss (equation 8):   L = (‖x - x̂‖² + ‖x - x̂_frozen(ReLU(π))‖²) / variance + λ ‖ReLU(π)‖₁
                     x̂_frozen: the decoder without gradient; decoder rows have norm 1
Here also:           alpha AuxK, on the gate.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.architectures import relu_l1
from trainer.code import SparseCode, where
from trainer.config import SaeConfig
from trainer.losses import with_auxiliary
from trainer.sae import Batch, Losses, Step, Widths


class Sae(relu_l1.Sae):
    """Gated SAE; parameters `r_mag` and `b_mag` (n_latents,) besides the common ones, b_enc is the gate's bias."""

    arch = "gated"
    unit_norm = True
    code_units = ("b_enc", "b_mag")

    def __init__(self, config: SaeConfig, widths: Widths) -> None:
        super().__init__(config, widths)
        self.r_mag = nn.Parameter(torch.zeros(config.n_latents))
        self.b_mag = nn.Parameter(torch.zeros(config.n_latents))

    def prepare_(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Set both biases so that each latent is active on a few rows."""
        super().prepare_(x)
        with torch.no_grad():
            self.b_mag.copy_(self.b_enc)

    def magnitudes(self, gate: SparseCode) -> SparseCode:
        """Return the code of the latents that the gate lets through: exp(r_mag) (π - b_enc) + b_mag, not below 0."""
        at = gate.indices
        scores = self.r_mag.exp()[at] * (gate.values - self.b_enc[at]) + self.b_mag[at]
        return gate._replace(values=scores.relu())

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the magnitudes where the gate is open."""
        return self.magnitudes(where(pre, pre > 0))

    def encode_by(self, kernel: ModuleType, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the code of rows by a kernel; see SparseAutoencoder.encode_by."""
        return self.magnitudes(super().encode_by(kernel, x))

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        gate = super().encode_by(step.kernel, batch.x)
        frozen, _ = self.squared_error(batch, gate, step.kernel, frozen=True)
        scale = len(batch.x)
        penalty = self.penalty_weight(step) * gate.values.sum() / scale + frozen / (scale * step.variance)
        return with_auxiliary(self, batch, self.magnitudes(gate), step, penalty)
