"""One SAE of a fleet while it is trained: its state, its step, its log line, its checkpoint and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from actstore import durable
from actstore.digests import canonical_json
from actstore.errors import TrainingDiverged
from trainer import kernels
from trainer.checkpoint import Run, load_checkpoint, new_sae
from trainer.initialize import give_massive_rows_latents_, initialize_
from trainer.kernels.gradients import recycle
from trainer.normalize import Normalization, joined_normalization
from trainer.optimize import ADAM_BETAS, ADAM_EPS, MAX_GRADIENT_NORM, DeadLatents, learning_rate
from trainer.resample import resample_, resamples
from trainer.sae import Batch, SparseAutoencoder, Step, tensors_of
from trainer.sources import joined

LOG_LINES = 200  # lines of metrics.jsonl a fit


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a sample says of the rows.

    Args:
        normalizations: of each store, inputs first.
        n_inputs: how many stores are encoded.
        sample: normalised rows, on the device.
        centre: (d_out,) of the rows to reconstruct, normalised.
        centre_in: (d_in,) of the rows to encode, for a transcoder.
        variance: typical squared distance of a row to reconstruct from the centre.
    """

    normalizations: tuple[Normalization, ...]
    n_inputs: int
    sample: Batch
    centre: Tensor
    centre_in: Tensor | None
    variance: float

    @property
    def of_input(self) -> Normalization:
        """The normalisation of what is encoded."""
        return joined_normalization(self.normalizations[: self.n_inputs])

    @property
    def of_target(self) -> Normalization:
        """The normalisation of what is reconstructed."""
        return joined_normalization(self.normalizations[self.n_inputs :] or self.normalizations)

    @property
    def factors(self) -> list[float]:
        """What the feeder multiplies each store's rows with: all of their normalisation if it is one number."""
        return [n.factor or 1.0 for n in self.normalizations]

    def batch(self, parts: list[Tensor]) -> Batch:
        """Return the batch of what the feeder gave for each store; the tensors are changed."""
        for part, normal in zip(parts, self.normalizations, strict=True):
            if normal.factor is None:
                part.sub_(normal.shift).mul_(normal.scale)
        return joined(parts, self.n_inputs)


@dataclass(slots=True)
class Member:
    """One SAE of a fleet while it is trained."""

    run: Run
    sae: SparseAutoencoder
    optimizer: torch.optim.Adam
    dead: DeadLatents
    kernel: ModuleType
    scaling: Scaling
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))  # see SUMS
    latest: dict[str, float] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)  # checkpoints that could not be used


SUMS = ("rows", "loss", "auxiliary", "active", "squared_error", "squared_norm")


def open_member(run: Run, scaling: Scaling, device: torch.device, kernel: str) -> Member:
    """Return an SAE ready to train: from its newest checkpoint that verifies, or from its seed."""
    sae = new_sae(run.config, run.widths)
    complaints: list[str] = []
    found = load_checkpoint(run, _state_shapes(sae), complaints)
    if found is None:
        initialize_(sae, scaling.centre.cpu(), None if scaling.centre_in is None else scaling.centre_in.cpu())
    sae.to(device)
    if found is None:
        give_massive_rows_latents_(sae, scaling.sample)
        sae.prepare_(scaling.sample.x)
    groups = [{"params": [p], "factor": sae.lr_factors.get(name, 1.0)} for name, p in sae.named_parameters()]
    optimizer = torch.optim.Adam(groups, lr=run.config.lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    module = kernels.choose(kernel, device, run.config.k, run.config.n_latents, run.config.precision)
    member = Member(run, sae, optimizer, DeadLatents(run.config, device), module, scaling, complaints=complaints)
    if found is not None:
        member.step, tensors, scalars = found
        _restore_(member, tensors, scalars)
    return member


def state_of(member: Member) -> dict[str, Tensor]:
    """Return every tensor that training changes, by name."""
    tensors = tensors_of(member.sae)
    for name, parameter in member.sae.named_parameters():
        state = member.optimizer.state[parameter]
        tensors |= {f"adam.mean.{name}": state["exp_avg"], f"adam.square.{name}": state["exp_avg_sq"]}
    return {**tensors, "since_active": member.dead.since, "sums": member.sums}


def _state_shapes(sae: SparseAutoencoder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(sae).items()}
    moments = {f"adam.{kind}.{name}": shapes[name] for name, _ in sae.named_parameters() for kind in ("mean", "square")}
    own = {"since_active": ((sae.config.n_latents,), torch.int64), "sums": ((len(SUMS),), torch.float64)}
    return {**shapes, **moments, **own}


@torch.no_grad()
def _restore_(member: Member, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    for name, tensor in tensors_of(member.sae).items():
        tensor.copy_(tensors[name])
    for name, parameter in member.sae.named_parameters():
        member.optimizer.state[parameter] = {
            "step": torch.tensor(float(member.step), device=parameter.device),
            "exp_avg": tensors[f"adam.mean.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"adam.square.{name}"].to(parameter.device),
        }
    member.dead.since.copy_(tensors["since_active"])
    member.sums = tensors["sums"]
    # Counts stay integers: a fit that was killed after its last step writes them into the result as they are here.
    member.latest = {name: value if type(value) is int else float(value) for name, value in scalars.items()}


def clip_gradients_(sae: SparseAutoencoder, kernel: ModuleType) -> None:
    """Project the decoder's gradient off its rows, if they are of norm 1; scale all gradients to a joint norm of at most 1."""
    assert sae.W_dec.grad is not None
    projected = sae.unit_norm and len(sae.widths.parts) == 1
    of_decoder = kernel.project_rows_(sae.W_dec.grad, sae.W_dec) if projected else float(torch.linalg.vector_norm(sae.W_dec.grad))
    others = [p.grad for p in sae.parameters() if p is not sae.W_dec and p.grad is not None]
    norm = math.hypot(of_decoder, *(float(torch.linalg.vector_norm(g)) for g in others))
    if norm > MAX_GRADIENT_NORM:
        torch._foreach_mul_([sae.W_dec.grad, *others], MAX_GRADIENT_NORM / norm)


def train_step(member: Member, batch: Batch, squared_norm: float) -> None:
    """Train one SAE on one batch and log.

    Args:
        member: the SAE.
        batch: normalised rows.
        squared_norm: summed squared distance of the rows to reconstruct from the centre.
    """
    config, sae = member.run.config, member.sae
    rate = learning_rate(config, member.step)
    for group in member.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    step = Step(member.step / config.steps, member.dead.dead(), member.scaling.variance, member.kernel, member.step)
    losses = sae.losses(batch, step)
    if not torch.isfinite(losses.total):
        raise TrainingDiverged(
            f"the loss is {losses.total.item()} at step {member.step} with learning rate {rate:.3g}",
            f"run {member.run.digest[:12]} (n_latents {config.n_latents}, k {config.k})",
            "use a smaller --lr; the checkpoint before stays",
        )
    losses.total.backward()  # type: ignore[no-untyped-call]
    clip_gradients_(sae, member.kernel)
    member.optimizer.step()
    recycle(sae.parameters())
    sae.constrain_(member.kernel)
    sae.after_step_(losses.code, step)
    member.dead.update_(losses.code)
    if resamples(config, member.step):
        resample_(sae, member.optimizer, member.dead, batch)
    member.step += 1
    n = len(batch.x)
    values = [n, losses.total.item() * n, losses.auxiliary.item() * n, int((losses.code.values != 0).sum())]
    member.sums += torch.tensor([*values, losses.squared_error.item(), squared_norm], dtype=torch.float64)
    interval = max(1, config.steps // LOG_LINES)
    if member.step % interval == 0 or member.step == config.steps:
        _log(member)


def _log(member: Member) -> None:
    """Append one line of metrics; nothing in it depends on the clock, so that a resumed run's file is equal."""
    config, sums = member.run.config, dict(zip(SUMS, member.sums.tolist(), strict=True))
    member.latest = {
        "step": member.step,
        "rows": min(member.step * config.batch_size, config.rows),
        "loss": sums["loss"] / sums["rows"],
        "auxiliary": sums["auxiliary"] / sums["rows"],
        "fvu": sums["squared_error"] / max(sums["squared_norm"], 1e-300),
        "l0": sums["active"] / sums["rows"],
        "dead_fraction": float(member.dead.dead().double().mean()),
        "lr": learning_rate(config, member.step - 1),
    }
    member.sums = torch.zeros_like(member.sums)
    durable.append_line(member.run.path / "metrics.jsonl", canonical_json(member.latest) + b"\n")
