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
from trainer.checkpoint import PARAMETERS, Run, load_checkpoint, new_sae, parameter_shapes
from trainer.kernels.gradients import recycle
from trainer.optimize import ADAM_BETAS, ADAM_EPS, MAX_GRADIENT_NORM, DeadLatents, learning_rate
from trainer.sae import SparseAutoencoder, initialize_

LOG_LINES = 200  # lines of metrics.jsonl a fit


@dataclass(frozen=True, slots=True)
class Scaling:
    """What the sample says of the rows: `scale` makes the median norm 1; `centre` and `variance` are of scaled rows."""

    scale: float
    centre: Tensor
    variance: float


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
    sae = new_sae(run.config, run.d_model)
    initialize_(sae, scaling.centre.cpu())
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=run.config.lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    module = kernels.choose(kernel, device, run.config.k, run.config.n_latents, run.config.precision)
    member = Member(run, sae, optimizer, DeadLatents(run.config, device), module, scaling)
    found = load_checkpoint(run, _state_shapes(run), member.complaints)
    if found is not None:
        member.step, tensors, scalars = found
        _restore_(member, tensors, scalars)
    return member


def state_of(member: Member) -> dict[str, Tensor]:
    """Return every tensor that training changes, by name."""
    tensors = {name: getattr(member.sae, name) for name in PARAMETERS}
    for name in PARAMETERS:
        state = member.optimizer.state[getattr(member.sae, name)]
        tensors |= {f"adam.mean.{name}": state["exp_avg"], f"adam.square.{name}": state["exp_avg_sq"]}
    return {**tensors, "since_active": member.dead.since, "sums": member.sums}


def _state_shapes(run: Run) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    shapes = parameter_shapes(run.config, run.d_model)
    moments = {f"adam.{kind}.{name}": shape for name, shape in shapes.items() for kind in ("mean", "square")}
    own = {"since_active": ((run.config.n_latents,), torch.int64), "sums": ((len(SUMS),), torch.float64)}
    return {**shapes, **moments, **own}


@torch.no_grad()
def _restore_(member: Member, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    for name in PARAMETERS:
        parameter = getattr(member.sae, name)
        parameter.copy_(tensors[name])
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
    """Project the decoder's gradient off its unit rows, then scale all gradients to a joint norm of at most 1."""
    assert sae.W_dec.grad is not None
    of_decoder = kernel.project_rows_(sae.W_dec.grad, sae.W_dec)
    others = [p.grad for p in sae.parameters() if p is not sae.W_dec and p.grad is not None]
    norm = math.hypot(of_decoder, *(float(torch.linalg.vector_norm(g)) for g in others))
    if norm > MAX_GRADIENT_NORM:
        torch._foreach_mul_([sae.W_dec.grad, *others], MAX_GRADIENT_NORM / norm)


def train_step(member: Member, batch: Tensor, squared_norm: float) -> None:
    """Train one SAE on one batch and log.

    Args:
        member: the SAE.
        batch: (batch, d_model) scaled rows.
        squared_norm: summed squared distance of these rows from the centre.
    """
    config, sae = member.run.config, member.sae
    rate = learning_rate(config, member.step)
    for group in member.optimizer.param_groups:
        group["lr"] = rate
    losses = sae.losses(batch, member.dead.dead(), member.scaling.variance, member.kernel)
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
    member.kernel.normalize_rows_(sae.W_dec)
    member.dead.update_(losses.code)
    member.step += 1
    n = len(batch)
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
