"""The common sparse autoencoder: four parameters, what encodes, what decodes, what a loss gets and returns.

What kind of SAE it is follows from the rows. Of one store: an autoencoder. Of several row-aligned stores side by side:
a crosscoder (Lindsey et al. 2024, "Sparse Crosscoders"). With another store's rows to reconstruct: a transcoder (Dunefsky
et al. 2024, arXiv 2406.11944), with `skip` a skip transcoder (Paulo et al. 2025, arXiv 2501.18823).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from trainer.code import SparseCode
from trainer.config import SaeConfig, parse_config
from trainer.distributed import ALONE, Mesh

OPTIONS = ConfigDict(extra="forbid", allow_inf_nan=False)  # of every architecture's Options


@dataclass(frozen=True, config=OPTIONS)
class NoOptions:
    """The options of an architecture that has none."""


class Widths(NamedTuple):
    """Widths of the rows.

    Args:
        inputs: of each store that is encoded.
        targets: of each store that is reconstructed; None where that is the inputs.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None = None

    @property
    def d_in(self) -> int:
        """Width of what is encoded."""
        return sum(self.inputs)

    @property
    def kind(self) -> str:
        """What an SAE of these rows is: "sae", "crosscoder" or "transcoder"."""
        return "transcoder" if self.targets is not None else "crosscoder" if len(self.inputs) > 1 else "sae"

    def __str__(self) -> str:
        """Return the widths for people, such as 64 + 64 to 32."""
        return " to ".join(" + ".join(map(str, side)) for side in (self.inputs, self.targets) if side is not None)

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of the parts of what is reconstructed."""
        return self.inputs if self.targets is None else self.targets

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return sum(self.parts)


class Batch(NamedTuple):
    """Normalised rows of a step: x (batch, d_in) to encode, y (batch, d_out) to reconstruct; one tensor if not a transcoder."""

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]


class Step(NamedTuple):
    """What a loss depends on besides rows and parameters.

    Args:
        progress: share of the training that is done, 0 to 1.
        dead: (n_latents,) which latents count as dead.
        variance: typical squared distance of a row of y from the centre; the losses are in units of it.
        kernel: module of `trainer.kernels`.
        number: steps done.
        rows: of the batch on all ranks together; None where there is one.
    """

    progress: float
    dead: Bool[Tensor, " n_latents"]
    variance: float
    kernel: ModuleType
    number: int = 0
    rows: int | None = None

    def count(self, x: Float[Tensor, "batch d_in"]) -> int:
        """Return the rows of a batch, those of other ranks among them: what means are taken over."""
        return len(x) if self.rows is None else self.rows


class Losses(NamedTuple):
    """What an architecture's loss returns: scalars to add up, the code and the summed squared error for metrics."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    code: SparseCode
    squared_error: Float[Tensor, ""]


class SparseAutoencoder(nn.Module):
    """An SAE with `W_enc` (n_latents, d_in), `b_enc` (n_latents,), `W_dec` (n_latents, d_out), `b_dec` (d_out,).

    Both matrices are stored latent by latent, so everything that touches only active latents reads contiguous rows. A
    transcoder has `b_in` (d_in,), the centre of its input, and with `skip` `W_skip` (d_out, d_in).

    An architecture defines `select` and `losses`, and where it needs them `Options`, more parameters, buffers (kept in
    checkpoints as parameters are), `prepare_`, `after_step_`.

    Args:
        config: the resolved configuration.
        widths: of the rows.

    Raises: UsageError: not the architecture's options.
    """

    arch: ClassVar[str]
    Options: ClassVar[Any] = NoOptions
    by_threshold: ClassVar[bool] = False  # a latent is active whatever the others do, so its code may be rescaled alone
    unit_norm: ClassVar[bool] = True  # decoder rows are kept at norm 1 while training
    centred: ClassVar[bool] = True  # an autoencoder subtracts b_dec from what it encodes
    lr_factors: ClassVar[dict[str, float]] = {}  # parameters that learn at another rate than Adam's, and how many times it
    code_units: ClassVar[tuple[str, ...]] = ("b_enc",)  # tensors (n_latents,) in the units of the code
    spreads: ClassVar[tuple[str, ...]] = ()  # the ways, besides "fleet", in which ranks may share the training of one SAE

    def __init__(self, config: SaeConfig, widths: Widths) -> None:
        super().__init__()
        self.config, self.widths, self.mesh = config, widths, ALONE
        self.options = parse_config(dict(config.options), self.Options, f"--option of {config.arch}")
        self.W_enc = nn.Parameter(torch.empty(config.n_latents, widths.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.W_dec = nn.Parameter(torch.empty(config.n_latents, widths.d_out))
        self.b_dec = nn.Parameter(torch.zeros(widths.d_out))
        if widths.targets is not None:
            self.register_buffer("b_in", torch.zeros(widths.d_in))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(widths.d_out, widths.d_in))

    @property
    def centre(self) -> Float[Tensor, " d_in"]:
        """What is subtracted from rows before they are encoded."""
        if self.widths.targets is not None:
            return self.b_in  # type: ignore[return-value]
        return self.b_dec if self.centred else torch.zeros_like(self.b_dec)

    @property
    def latents(self) -> range:
        """Which latents this process holds: all, unless they are spread over ranks."""
        return self.mesh.latents.share(self.config.n_latents)

    @property
    def latentwise(self) -> frozenset[str]:
        """Names of the tensors that hold a row, or a number, of each latent."""
        return frozenset(("W_enc", "W_dec", *self.code_units))

    def select(self, pre: Float[Tensor, "batch n_latents"]) -> SparseCode:
        """Return the active latents of each row from its pre-activations: the architecture's sparsity rule."""
        raise NotImplementedError

    def losses(self, batch: Batch, step: Step) -> Losses:
        """Return the training losses of a batch."""
        raise NotImplementedError

    def prepare_(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Set initial values that depend on the rows, from a sample of them; called once, after `initialize_`."""

    def after_step_(self, code: SparseCode, step: Step) -> None:
        """Change buffers after an optimizer step on this code."""

    @torch.no_grad()
    def constrain_(self, kernel: ModuleType) -> None:
        """Put the decoder back where it is kept, after an optimizer step."""
        if self.unit_norm:
            kernel.normalize_rows_(self.W_dec)

    @torch.no_grad()
    def rescale_(self, factors: Float[Tensor, " n_latents"]) -> None:
        """Multiply by a factor for each latent what is in the units of the code, the weights left out."""
        for name in self.code_units:
            getattr(self, name).mul_(factors)

    def decoder_norms(self) -> Float[Tensor, " n_latents"]:
        """Return what a latent's activation counts: its decoder's norm, of a crosscoder the sum of its parts' norms."""
        return torch.stack([part.norm(dim=1) for part in torch.split(self.W_dec, list(self.widths.parts), dim=1)]).sum(0)

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n_latents"]:
        """Return the encoder's output before the sparsity rule: (x - centre) W_encᵀ + b_enc."""
        return torch.addmm(self.b_enc, x - self.centre, self.W_enc.T)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the active latents of each row."""
        return self.select(self.pre_activations(x))

    def encode_by(self, kernel: ModuleType, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return `encode_sparse` of rows by a kernel, without the matrix of all pre-activations; not differentiable.

        The pre-activations over `threshold`, or over 0 where there is none; an architecture with another rule overrides it.
        """
        threshold = getattr(self, "threshold", torch.zeros_like(self.b_enc))
        code: SparseCode = kernel.encode_over(x, self.W_enc, self.b_enc, self.centre, threshold)
        return code

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n_latents"]:
        """Return the dense code, zero where a latent is not active."""
        return self.encode_sparse(x).dense(self.config.n_latents)

    def decode_sparse(self, code: SparseCode, x: Float[Tensor, "batch d_in"] | None = None) -> Float[Tensor, "batch d_out"]:
        """Return the reconstruction of a sparse code; touches active latents only. A skip transcoder needs its rows x too."""
        weighted = F.embedding_bag(code.indices, self.W_dec, code.offsets[:-1], per_sample_weights=code.values, mode="sum")
        return weighted + self.b_dec + self._skipped(x)

    def decode(
        self, codes: Float[Tensor, "batch n_latents"], x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Return the reconstruction of dense codes: codes W_dec + b_dec, with `skip` + (x - b_in) W_skipᵀ."""
        return torch.addmm(self.b_dec, codes, self.W_dec) + self._skipped(x)

    def _skipped(self, x: Tensor | None) -> Tensor | float:
        if not self.config.skip:
            return 0.0
        if x is None:
            raise ValueError("a skip transcoder decodes with the rows it encoded: pass x")
        return (x - self.centre) @ self.W_skip.T

    def squared_error(
        self, batch: Batch, code: SparseCode, kernel: ModuleType, frozen: bool = False
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
        """Return the summed squared error of a code's reconstruction of y, and y - ŷ, detached; `frozen` teaches the code."""
        W_dec, b_dec = (self.W_dec.detach(), self.b_dec.detach()) if frozen else (self.W_dec, self.b_dec)
        if not self.config.skip:
            found: tuple[Tensor, Tensor] = kernel.squared_error(batch.y, code, W_dec, b_dec)
            return found
        skipped = (batch.x - self.centre) @ self.W_skip.T
        error, residual = kernel.squared_error(batch.y - skipped.detach(), code, W_dec, b_dec)
        if frozen:
            return error, residual
        # The kernels do not differentiate their target: this adds nothing but the gradient, -2 residual.
        return error - 2 * (residual * (skipped - skipped.detach())).sum(), residual


@torch.no_grad()
def spread_(sae: SparseAutoencoder, mesh: Mesh) -> None:
    """Give an SAE without memory (device "meta") zeros of its own share of the latents, and its place among the ranks."""
    sae.mesh = mesh
    for name, tensor in tensors_of(sae).items():
        shape = (len(sae.latents), *tensor.shape[1:]) if name in sae.latentwise else tensor.shape
        mine = torch.zeros(shape, dtype=tensor.dtype)
        setattr(sae, name, nn.Parameter(mine) if isinstance(tensor, nn.Parameter) else mine)


def tensors_of(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Return every tensor an SAE consists of, parameters and buffers, by name."""
    return {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
