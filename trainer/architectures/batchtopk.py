"""BatchTopK: the k · batch largest pre-activations of a whole batch are its code. Bussmann et al. 2024, arXiv 2412.06410.

Code (section 3):      z = BatchTopK(ReLU(W_enc (x - b_dec) + b_enc)),   x̂ = W_decᵀ z + b_dec
Inference (section 3): z_i = π_i where π_i > θ; θ is the mean, over batches, of the smallest chosen pre-activation
Loss:                  as TopK's, with AuxK
Crosscoder (Minder et al. 2025, arXiv 2504.02922): chosen by π_i Σ_l ‖W_dec,i,l‖; decoder rows are kept where that sum is 1.
"""

from __future__ import annotations

from types import ModuleType
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from trainer.code import SparseCode, where
from trainer.config import SaeConfig
from trainer.losses import annealed_k, with_auxiliary
from trainer.sae import OPTIONS, Batch, Losses, SparseAutoencoder, Step, Widths

AVERAGED_SHARE = 0.02  # of the training: over its last steps the weights hardly move, as the learning rate goes to 0


@dataclass(frozen=True, config=OPTIONS)
class BatchTopK:
    """Options.

    Args:
        k_annealing: share of the training over which k falls from d_model to its value; see `losses.annealed_k`.
    """

    k_annealing: Annotated[float, Field(ge=0, le=1)] = 0.0


class Sae(SparseAutoencoder):
    """BatchTopK SAE; buffer `threshold` (n_latents,): the same number for all, until a fold gives each its own units."""

    arch = "batchtopk"
    spreads: ClassVar[tuple[str, ...]] = ("data", "latents")
    Options = BatchTopK
    by_threshold = True
    code_units = ("b_enc", "threshold")

    def __init__(self, config: SaeConfig, widths: Widths) -> None:
        super().__init__(config, widths)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(config.n_latents))

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the pre-activations over the learned threshold."""
        return where(pre, pre > self.threshold)

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        return with_auxiliary(self, batch, self.chosen(batch, step), step)

    def chosen(self, batch: Batch, step: Step) -> SparseCode:
        """Return the code of a batch while training."""
        pairs = step.count(batch.x) * annealed_k(self, self.options.k_annealing, step)
        weights = (self.W_enc, self.b_enc, self.centre)
        code: SparseCode = step.kernel.encode_batchtopk(batch.x, *weights, pairs, float(self.threshold[0]))
        return code

    @torch.no_grad()
    def after_step_(self, code: SparseCode, step: Step) -> None:
        """Average the threshold over about the last fiftieth of the steps."""
        none = -torch.finfo(torch.float32).max
        smallest = -self.mesh.world.max_(-code.values.min() if len(code.values) else self.b_dec.new_tensor(none), "the threshold")
        if float(smallest) < -none:
            share = max(1 / (step.number + 1), 1 / max(1.0, AVERAGED_SHARE * self.config.steps))
            self.threshold.lerp_(smallest.to(self.threshold.dtype).expand_as(self.threshold), share)

    @torch.no_grad()
    def constrain_(self, kernel: ModuleType) -> None:
        """Keep decoder rows at norm 1; those of a crosscoder where their parts' norms add up to 1."""
        if len(self.widths.parts) == 1:
            super().constrain_(kernel)
        else:
            self.W_dec.div_(self.decoder_norms().clamp_min(torch.finfo(self.W_dec.dtype).tiny)[:, None])
