"""ReLU with an L1 penalty. Bricken et al. 2023, "Towards Monosemanticity"; Conerly et al. 2024, Anthropic's April update.

Code:  z = ReLU(W_enc (x - b_dec) + b_enc),   x̂ = W_decᵀ z + b_dec
Loss:  L = ‖x - x̂‖² / variance + λ Σ_i z_i ‖W_dec,i‖ + alpha AuxK
       Decoder rows are free (April 2024); with rows of norm 1 this would be the λ ‖z‖₁ of 2023.
Crosscoder (Lindsey et al. 2024, "Sparse Crosscoders"): the norm is the sum over the parts, Σ_l ‖W_dec,i,l‖.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from trainer.code import SparseCode, where
from trainer.losses import with_auxiliary
from trainer.penalized import PenalizedSae, Penalty
from trainer.sae import OPTIONS, Batch, Losses, Step


@dataclass(frozen=True, config=OPTIONS)
class ReluL1(Penalty):
    """Options, besides `Penalty`'s.

    Args:
        first_l0: active latents a row that the encoder's bias begins with, in units of k; 0 leaves the bias at zero.
    """

    first_l0: Annotated[float, Field(ge=0)] = 4.0


class Sae(PenalizedSae):
    """ReLU SAE; see the module's first lines."""

    arch = "relu_l1"
    Options: ClassVar[Any] = ReluL1
    unit_norm = False

    def prepare_(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Set the encoder's bias so that each latent is active on a few rows."""
        if self.options.first_l0:
            with torch.no_grad():
                self.b_enc.sub_(self.first_quantiles(x))

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the positive pre-activations."""
        return where(pre, pre > 0)

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        code = self.encode_by(step.kernel, batch.x)
        penalty = self.penalty_weight(step) * self.penalty(code, step) / len(batch.x)
        return with_auxiliary(self, batch, code, step, penalty)

    def penalty(self, code: SparseCode, step: Step) -> Float[Tensor, ""]:
        """Return the summed L1 norm of the batch's codes, in units of the reconstruction."""
        return (code.values * self.decoder_norms()[code.indices]).sum()
