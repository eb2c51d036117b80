"""TopK: the k largest pre-activations of each row are the code. Gao et al. 2024, arXiv 2406.04093.

Code (section 2.3):      z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   x̂ = W_decᵀ z + b_dec
Loss (section 2.3, 2.4): L = ‖x - x̂‖² / variance + alpha AuxK
AuxK (appendix A.2):     see `trainer.losses.aux_loss`; alpha = 1/32, k_aux = d_model / 2
Multi-TopK (section 5.3): L(k) + L(4k) / 8, which keeps the SAE usable at other k
"""

from __future__ import annotations

from types import ModuleType
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from trainer.code import SparseCode, of_k
from trainer.losses import annealed_k, with_auxiliary
from trainer.sae import OPTIONS, Batch, Losses, SparseAutoencoder, Step

MULTI, SHARE = 4, 1 / 8  # Gao et al. 2024, section 5.3


@dataclass(frozen=True, config=OPTIONS)
class TopK:
    """Options.

    Args:
        multi_topk: add the loss of four times as many latents, an eighth of it.
        k_annealing: share of the training over which k falls from d_model to its value; see `losses.annealed_k`.
    """

    multi_topk: bool = False
    k_annealing: Annotated[float, Field(ge=0, le=1)] = 0.0


class Sae(SparseAutoencoder):
    """TopK SAE; see the module's first lines."""

    arch = "topk"
    spreads = ("data", "latents")
    Options = TopK

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the k largest pre-activations of each row, after ReLU."""
        values, indices = pre.topk(self.config.k, dim=1, sorted=False)
        return of_k(indices, values.relu())

    def encode_by(self, kernel: ModuleType, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the code of rows by a kernel; see SparseAutoencoder.encode_by."""
        code: SparseCode = kernel.encode_topk(x, self.W_enc, self.b_enc, self.centre, self.config.k)
        return code

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        k, weights = annealed_k(self, self.options.k_annealing, step), (self.W_enc, self.b_enc, self.centre)
        if not self.options.multi_topk:
            return with_auxiliary(self, batch, step.kernel.encode_topk(batch.x, *weights, k), step)
        more = step.kernel.encode_topk(batch.x, *weights, min(MULTI * k, self.config.n_latents))
        values, indices = (t.view(len(batch.x), -1) for t in (more.values, more.indices))
        best = values.detach().topk(k, dim=1, sorted=False).indices
        code = of_k(indices.gather(1, best), values.gather(1, best))
        losses = with_auxiliary(self, batch, code, step)
        error, _ = self.squared_error(batch, more, step.kernel)
        return losses._replace(total=losses.total + SHARE * error / (step.count(batch.x) * step.variance))
