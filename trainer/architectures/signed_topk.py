"""Signed TopK: the k largest pre-activations of each row are the code, negative ones as they are; nothing is subtracted.

Code:  z = TopK(W_enc x + b_enc),   x̂ = W_decᵀ z + b_dec
Loss:  L = ‖x - x̂‖² / variance + alpha AuxK

Source: the SAE of the reference study (`trainer.reference_study`): no ReLU, no centre, decoder rows of any norm. Its own
training has no AuxK; `trainer fit --preset reference` is that training, and runs of it have the option `study`.
"""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from actstore.errors import UsageError
from trainer.code import SparseCode, of_k
from trainer.losses import with_auxiliary
from trainer.sae import OPTIONS, Batch, Losses, SparseAutoencoder, Step


@dataclass(frozen=True, config=OPTIONS)
class SignedTopK:
    """Options.

    Args:
        study: trained as the reference study does, by `--preset reference` alone.
    """

    study: bool = False


class Sae(SparseAutoencoder):
    """Signed TopK SAE; see the module's first lines."""

    arch = "signed_topk"
    Options = SignedTopK
    unit_norm = False
    centred = False

    def prepare_(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Refuse what only the study's own loop trains. Raises: UsageError."""
        if self.options.study:
            raise UsageError("--option study=true belongs to --preset reference", do="trainer fit --preset reference")

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the k largest pre-activations of each row, whatever their sign."""
        values, indices = pre.topk(self.config.k, dim=1)
        return of_k(indices, values)

    def encode_by(self, kernel: ModuleType, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the code of rows; the kernels end with a ReLU, so this takes plain torch. See SparseAutoencoder.encode_by."""
        return self.encode_sparse(x)

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the losses of a batch; see SparseAutoencoder.losses."""
        return with_auxiliary(self, batch, self.encode_sparse(batch.x), step)
