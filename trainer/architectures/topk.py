"""TopK: the k largest pre-activations of each row are the code. Gao et al. 2024, arXiv 2406.04093.

Code (section 2.3):      z = ReLU(TopK(W_enc (x - b_dec) + b_enc)),   x̂ = W_decᵀ z + b_dec
Loss (section 2.3, 2.4): L = ‖x - x̂‖² / variance + alpha AuxK
AuxK (appendix A.2):     the k_aux largest dead latents reconstruct the residual e = x - x̂ (detached);
                         AuxK = ‖e - ê‖² / ‖e - mean e‖², alpha = 1/32, k_aux = d_model / 2
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.sae import Losses, SparseAutoencoder, SparseCode


class Sae(SparseAutoencoder):
    """TopK SAE; see the module's first lines."""

    arch = "topk"

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the k largest pre-activations of each row, after ReLU."""
        values, indices = pre.topk(self.config.k, dim=1, sorted=False)
        return SparseCode(indices, values.relu())

    def losses(
        self, x: Float[Tensor, "batch d_model"], dead: Bool[Tensor, " n_latents"], variance: float, kernel: ModuleType
    ) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        code = kernel.encode_topk(self, x, self.config.k)
        residual = x - kernel.decode(self, code)
        squared_error = residual.square().sum()
        reconstruction = squared_error / (len(x) * variance)
        auxiliary = self._aux_loss(x, residual.detach(), dead)
        total = reconstruction + self.config.aux_alpha * auxiliary
        return Losses(total, reconstruction, auxiliary, code, squared_error)

    def _aux_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Return AuxK, dense over the dead latents only; zero when none is dead."""
        (which,) = dead.nonzero(as_tuple=True)
        if not len(which) or not self.config.aux_alpha:
            return x.new_zeros(())
        # b_dec belongs to the main loss alone: it is on both sides of the residual.
        pre = torch.addmm(self.b_enc[which], x - self.b_dec.detach(), self.W_enc[which].T)  # (batch, n_dead)
        values, indices = pre.topk(min(self.config.aux_k, len(which)), dim=1, sorted=False)
        code = torch.zeros_like(pre).scatter(1, indices, values.relu())
        error = (residual - code @ self.W_dec[which]).square().sum()
        return error / (residual - residual.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
