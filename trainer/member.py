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
from trainer.checkpoint import Run, new_sae, tensor_shapes
from trainer.config import SaeConfig
from trainer.distributed import ALONE, Mesh
from trainer.initialize import give_massive_rows_latents_, initialize_
from trainer.kernels.gradients import recycle
from trainer.kernels.sharded import Sharded
from trainer.normalize import Normalization, joined_normalization
from trainer.optimize import ADAM_BETAS, ADAM_EPS, MAX_GRADIENT_NORM, DeadLatents, learning_rate
from trainer.resample import resample_, resamples
from trainer.sae import Batch, SparseAutoencoder, Step, spread_, tensors_of
from trainer.saved import Shapes
from trainer.shards import load_checkpoint
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


def open_member(run: Run, scaling: Scaling, device: torch.device, kernel: str, mesh: Mesh = ALONE) -> Member:
    """Return an SAE, or this process's part of it, ready to train: from its newest checkpoint that verifies, or its seed."""
    with torch.device("cpu" if mesh.world.world == 1 else "meta"):
        sae = new_sae(run.config, run.widths)
    if mesh.world.world > 1:
        spread_(sae, mesh)
    complaints: list[str] = []
    shapes, latentwise = _state_shapes(sae)
    found = load_checkpoint(run, shapes, complaints, latentwise, mesh)
    if found is None:
        initialize_(sae, scaling.centre.cpu(), None if scaling.centre_in is None else scaling.centre_in.cpu())
    sae.to(device)
    if found is None:
        give_massive_rows_latents_(sae, scaling.sample)
        sae.prepare_(scaling.sample.x)
    for name, tensor in tensors_of(sae).items():  # what several ranks hold is the same bits on each, from here on
        if mesh.latents.world == 1 or name not in sae.latentwise:
            mesh.world.same_(tensor.detach(), f"the first {name}")
    groups = [{"params": [p], "factor": sae.lr_factors.get(name, 1.0)} for name, p in sae.named_parameters()]
    optimizer = torch.optim.Adam(groups, lr=run.config.lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    module = kernels.choose(kernel, device, run.config.k, run.config.n_latents, run.config.precision)
    if mesh.world.world > 1:
        module = Sharded(module, mesh, sae.latents.start)
    member = Member(run, sae, optimizer, DeadLatents(run.config, device, mesh), module, scaling, complaints=complaints)
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


def _state_shapes(sae: SparseAutoencoder) -> tuple[Shapes, frozenset[str]]:
    """Return name, shape and dtype of what a checkpoint holds of all latents, and the names that have a row for each latent."""
    shapes = tensor_shapes(sae.config, sae.widths)
    moments = {f"adam.{kind}.{name}": name for name, _ in sae.named_parameters() for kind in ("mean", "square")}
    latentwise = {"since_active", *sae.latentwise, *(moment for moment, name in moments.items() if name in sae.latentwise)}
    own = {"since_active": ((sae.config.n_latents,), torch.int64), "sums": ((len(SUMS),), torch.float64)}
    return {**shapes, **{moment: shapes[name] for moment, name in moments.items()}, **own}, frozenset(latentwise)


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


def add_up_gradients_(sae: SparseAutoencoder) -> None:
    """Make each gradient that of the whole batch and of all latents: add what ranks found from their own share."""
    if sae.mesh.world.world == 1:
        return
    for name, parameter in sae.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sae.mesh.rows.sum_(parameter.grad, f"the gradient of {name}")
        if name not in sae.latentwise:
            sae.mesh.latents.sum_(parameter.grad, f"the gradient of {name}")


def clip_gradients_(sae: SparseAutoencoder, kernel: ModuleType) -> None:
    """Project the decoder's gradient off its rows, if they are of norm 1; scale all gradients to a joint norm of at most 1."""
    assert sae.W_dec.grad is not None
    projected = sae.unit_norm and len(sae.widths.parts) == 1
    of_decoder = kernel.project_rows_(sae.W_dec.grad, sae.W_dec) if projected else float(torch.linalg.vector_norm(sae.W_dec.grad))
    others = {name: p.grad for name, p in sae.named_parameters() if p is not sae.W_dec and p.grad is not None}
    norms = {name: float(torch.linalg.vector_norm(gradient)) for name, gradient in others.items()}
    if sae.mesh.latents.world > 1:
        own = math.hypot(of_decoder, *(norms.pop(name) for name in list(norms) if name in sae.latentwise))
        of_decoder = math.sqrt(sae.mesh.latents.sum_(torch.tensor(own**2, dtype=torch.float64), "the gradient's norm").item())
    norm = math.hypot(of_decoder, *norms.values())
    if norm > MAX_GRADIENT_NORM:
        torch._foreach_mul_([sae.W_dec.grad, *others.values()], MAX_GRADIENT_NORM / norm)


def rows_of_step(config: SaeConfig, step: int) -> int:
    """Return the rows of a step, those of all ranks together.

    Example:
        >>> from trainer.config import FitConfig, resolve
        >>> (c,) = resolve(FitConfig(rows=100, batch_size=30), d_model=8, train_rows=100)
        >>> [rows_of_step(c, step) for step in range(c.steps)]
        [30, 30, 30, 10]
    """
    return min(config.batch_size, config.rows - step * config.batch_size)


def train_step(member: Member, batch: Batch, squared_norm: float) -> None:
    """Train one SAE on one batch and log.

    Args:
        member: the SAE.
        batch: normalised rows.
        squared_norm: summed squared distance of the rows to reconstruct from the centre.
    """
    config, sae, mesh = member.run.config, member.sae, member.sae.mesh
    rate = learning_rate(config, member.step)
    for group in member.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    rows = rows_of_step(config, member.step)
    step = Step(member.step / config.steps, member.dead.dead(), member.scaling.variance, member.kernel, member.step, rows)
    losses = sae.losses(batch, step)
    values = [losses.total.item() * rows, losses.auxiliary.item() * rows, losses.squared_error.item(), squared_norm]
    numbers = torch.tensor([len(batch.x), *values[:2], int((losses.code.values != 0).sum()), *values[2:]], dtype=torch.float64)
    mesh.latents.sum_(numbers[3:4], "the active latents")  # all else is of all latents already
    mesh.rows.sum_(numbers, "the numbers of a step")
    if not torch.isfinite(numbers[1]):
        raise TrainingDiverged(
            f"the loss is {losses.total.item()} at step {member.step} with learning rate {rate:.3g}",
            f"run {member.run.digest[:12]} (n_latents {config.n_latents}, k {config.k})",
            "use a smaller --lr; the checkpoint before stays",
        )
    losses.total.backward()  # type: ignore[no-untyped-call]
    add_up_gradients_(sae)
    clip_gradients_(sae, member.kernel)
    member.optimizer.step()
    recycle(sae.parameters())
    sae.constrain_(member.kernel)
    sae.after_step_(losses.code, step)
    member.dead.update_(losses.code, rows)
    if resamples(config, member.step):
        resample_(sae, member.optimizer, member.dead, batch)
    member.step += 1
    member.sums += numbers
    interval = max(1, config.steps // LOG_LINES)
    if member.step % interval == 0 or member.step == config.steps:
        _log(member)


def _log(member: Member) -> None:
    """Append one line of metrics; nothing in it depends on the clock, so that a resumed run's file is equal."""
    config, mesh, sums = member.run.config, member.sae.mesh, dict(zip(SUMS, member.sums.tolist(), strict=True))
    member.latest = {
        "step": member.step,
        "rows": min(member.step * config.batch_size, config.rows),
        "loss": sums["loss"] / sums["rows"],
        "auxiliary": sums["auxiliary"] / sums["rows"],
        "fvu": sums["squared_error"] / max(sums["squared_norm"], 1e-300),
        "l0": sums["active"] / sums["rows"],
        "dead_fraction": mesh.latents.total(int(member.dead.dead().sum()), "the dead latents") / config.n_latents,
        "lr": learning_rate(config, member.step - 1),
    }
    member.sums = torch.zeros_like(member.sums)
    if mesh.world.rank == 0:
        durable.append_line(member.run.path / "metrics.jsonl", canonical_json(member.latest) + b"\n")
