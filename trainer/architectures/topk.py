"""TopK: the k largest pre-activations of each row are the code. Gao et al. 2024, arXiv 2406.04093.

Code (section 2.3):      z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   x̂ = W_decᵀ z + b_dec
Loss (section 2.3, 2.4): L = ‖x - x̂‖² / variance + alpha AuxK
AuxK (appendix A.2):     see `trainer.losses.aux_loss`; alpha = 1/32, k_aux = d_model / 2
"""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from trainer.code import SparseCode, of_k
from trainer.losses import aux_loss
from trainer.sae import Losses, SparseAutoencoder


class Sae(SparseAutoencoder):
    """TopK SAE; see the module's first lines."""

    arch = "topk"

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the k largest pre-activations of each row, after ReLU."""
        values, indices = pre.topk(self.config.k, dim=1, sorted=False)
        return of_k(indices, values.relu())

    def losses(
        self, x: Float[Tensor, "batch d_model"], dead: Bool[Tensor, " n_latents"], variance: float, kernel: ModuleType
    ) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        code = kernel.encode_topk(x, self.W_enc, self.b_enc, self.b_dec, self.config.k)
        squared_error, residual = kernel.squared_error(x, code, self.W_dec, self.b_dec)
        reconstruction = squared_error / (len(x) * variance)
        auxiliary = aux_loss(self, x, residual, dead, kernel)
        total = reconstruction + self.config.aux_alpha * auxiliary
        return Losses(total, reconstruction, auxiliary, code, squared_error)
