"""One pass over a store trains a fleet of SAEs: the same batch to each, each with its own optimizer and run folder.

A run continues bit for bit (CPU, same thread count): batches are a function of (shuffle seed, step), and a checkpoint
holds everything else. SAEs of a fleet may stand at different steps; each takes part from its own step on.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actstore import durable
from actstore.digests import canonical_json
from actstore.errors import TrainingDiverged, UsageError
from actstore.layout import StorePaths
from actstore.reader import Store
from trainer import kernels
from trainer.batches import Batches, companions, make_order, split_rows, to_tensor
from trainer.checkpoint import (
    PARAMETERS, Run, create_run, finish_run, load_checkpoint, new_sae, parameter_shapes, runs_folder, save_checkpoint,
)  # fmt: skip
from trainer.config import FitConfig, SaeConfig, resolve
from trainer.metrics import measure
from trainer.optimize import ADAM_BETAS, ADAM_EPS, MAX_GRADIENT_NORM, DeadLatents, learning_rate
from trainer.sae import (
    SparseAutoencoder, fold_scale_, geometric_median, initialize_, normalize_decoder_, project_decoder_gradient_,
)  # fmt: skip

SAMPLE_ROWS = 8192  # first rows of the order: scale, centre and variance are taken of them
LOG_LINES = 200  # lines of metrics.jsonl a fit
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class FitResult:
    """A finished run.

    Args:
        digest: the run digest.
        config: its configuration.
        metrics: final numbers: held-out, training and dead latents.
        repeated: whether it was finished before this call.
    """

    digest: str
    config: SaeConfig
    metrics: dict[str, Any]
    repeated: bool


@dataclass(slots=True)
class FitProgress:
    """What a fit reports to its caller; the caller prints, the library does not.

    Args:
        on_start: called once with a description of the work.
        on_step: called in every step with (rows of the batch, latest numbers of each SAE).
        stop: asked between steps; an exception it returns is raised after a checkpoint of every SAE.
    """

    on_start: Callable[[dict[str, Any]], None] = field(default=lambda about: None)
    on_step: Callable[[int, list[dict[str, float]]], None] = field(default=lambda rows, latest: None)
    stop: Callable[[], BaseException | None] = field(default=lambda: None)


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


SUMS = ("rows", "loss", "auxiliary", "active", "squared_error", "squared_norm")


def fit(
    store: Store, config: FitConfig, runs: Path | str | None = None, *, device: str = "auto", kernel: str = "auto",
    progress: FitProgress | None = None,
) -> list[FitResult]:  # fmt: skip
    """Train every SAE of a fleet from one pass over a store; finished runs cost nothing, started ones go on.

    Args:
        store: an open store.
        config: the fleet.
        runs: folder of runs; default $ACTSTORE_RUNS, else ./runs.
        device: "auto", "cpu", "cuda" or "mps".
        kernel: "auto", "reference" or "fast".
        progress: callbacks.

    Returns: a result for each SAE, in the order of the comma lists.
    Raises: UsageError, StoreLocked, StoreDamaged, DiskFull, StorageFailed; TrainingDiverged: a loss is not finite.
    """
    progress, folder = progress or FitProgress(), runs_folder(runs)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    split = split_rows(store, config)
    saes = resolve(config, store.d_model, split.n_train)
    row_bytes = store.d_model * store[:1].dtype.itemsize
    batches = Batches(store, split, make_order(split.n_train, row_bytes, saes[0]), config.batch_size)
    with contextlib.ExitStack() as locks:
        locks.enter_context(_reading(store))
        members = []
        made = [create_run(folder, sae, store) for sae in dict.fromkeys(saes)]
        for run in made:
            if run.result is None:
                locks.enter_context(durable.lock(folder / ".locks" / f"{run.digest}.lock", f"a fit, pid {os.getpid()}"))
        unfinished = [run for run in made if run.result is None]
        if unfinished:
            scaling = _scaling(batches, where)
            members = [_member(run, scaling, where, kernel) for run in unfinished]
            spread, ideal = companions(batches.order, config.batch_size, store.rows / split.documents)
            progress.on_start(
                {
                    "saes": len(members), "steps": saes[0].steps, "rows": saes[0].rows, "train_rows": split.n_train,
                    "held_out_rows": len(split.held_out), "batch_size": config.batch_size, "device": str(where),
                    "kernel": members[0].kernel.__name__.rsplit(".", 1)[-1], "first_step": min(m.step for m in members),
                    "companions": spread, "ideal_companions": ideal,
                }
            )  # fmt: skip
            _train(members, batches, where, progress)
            for member in members:
                _finish(member, store, split.held_out, where)
    results = {run.digest: create_run(folder, run.config, store).result for run in made}
    new = {member.run.digest for member in members}
    digests = [create_run(folder, sae, store).digest for sae in saes]
    return [FitResult(d, s, results[d] or {}, d not in new) for d, s in zip(digests, saes, strict=True)]


@contextlib.contextmanager
def _reading(store: Store) -> Any:
    """Hold the store's shared lock, so that it is not removed meanwhile; a read-only medium needs none."""
    stores = store.path.parent
    if not os.access(stores, os.W_OK):
        yield
        return
    with durable.lock(StorePaths(stores, store.digest).lock, "", shared=True):
        yield


def _scaling(batches: Batches, device: torch.device) -> Scaling:
    """Return scale, centre and variance of the first rows of the order; medians, so that massive rows do not count."""
    positions = batches.order.rows_of_window(0, 0)[:SAMPLE_ROWS]
    rows = np.sort(positions if batches.split.train is None else batches.split.train[positions])
    sample = to_tensor(batches.store.take("acts", rows)).to(device, torch.float32)
    norm = float(sample.norm(dim=1).median())
    if norm == 0:
        raise UsageError("half of the rows are zero: there is nothing to learn", f"store {batches.store.digest[:12]}")
    sample /= norm
    centre = geometric_median(sample)
    variance = float((sample - centre).square().sum(dim=1).median())
    return Scaling(1 / norm, centre, max(variance, torch.finfo(torch.float32).tiny))


def _member(run: Run, scaling: Scaling, device: torch.device, kernel: str) -> Member:
    """Return an SAE ready to train: from its newest checkpoint that verifies, or from its seed."""
    sae = new_sae(run.config, run.d_model)
    initialize_(sae, scaling.centre.cpu())
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=run.config.lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    module = kernels.choose(kernel, run.config.k, run.config.n_latents)
    member = Member(run, sae, optimizer, DeadLatents(run.config, device), module, scaling)
    found = load_checkpoint(run, _state_shapes(run))
    if found is not None:
        member.step, tensors, scalars, _ = found
        _restore_(member, tensors, scalars)
    if not (run.path / "environment.json").exists():
        durable.write_new(run.path, "environment.json", [canonical_json(environment(device))])
    return member


def _state(member: Member) -> dict[str, Tensor]:
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
    member.latest = {name: float(value) for name, value in scalars.items()}


def _train(members: list[Member], batches: Batches, device: torch.device, progress: FitProgress) -> None:
    """Run all remaining steps; checkpoint by time, and before an interruption."""
    first, saved = min(m.step for m in members), time.monotonic()
    for step, rows in enumerate(batches.iterate(first, members[0].run.config.rows, device), first):
        batch = rows * members[0].scaling.scale
        for member in members:
            if member.step == step:
                _step(member, batch)
        progress.on_step(len(batch), [m.latest for m in members])
        wanted = progress.stop()
        if wanted is not None or time.monotonic() - saved > CHECKPOINT_SECONDS:
            for member in members:
                save_checkpoint(member.run, member.step, _state(member), member.latest)
            saved = time.monotonic()
        if wanted is not None:
            raise wanted


def _step(member: Member, batch: Tensor) -> None:
    """Train one SAE on one batch of scaled rows and log."""
    config, sae = member.run.config, member.sae
    for group in member.optimizer.param_groups:
        group["lr"] = learning_rate(config, member.step)
    losses = sae.losses(batch, member.dead.dead(), member.scaling.variance, member.kernel)
    if not torch.isfinite(losses.total):
        raise TrainingDiverged(
            f"the loss is {losses.total.item()} at step {member.step} with learning rate {learning_rate(config, member.step):.3g}",
            f"run {member.run.digest[:12]} (n_latents {config.n_latents}, k {config.k})",
            "use a smaller --lr; the checkpoint before stays",
        )
    member.optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    project_decoder_gradient_(sae)
    torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_GRADIENT_NORM)
    member.optimizer.step()
    normalize_decoder_(sae)
    member.dead.update_(losses.code)
    member.step += 1
    with torch.no_grad():
        centred = (batch - member.scaling.centre).double().square().sum()
        n = len(batch)
        values = [n, float(losses.total) * n, float(losses.auxiliary) * n, int((losses.code.values != 0).sum())]
        member.sums += torch.tensor([*values, float(losses.squared_error), float(centred)], dtype=torch.float64)
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


def _finish(member: Member, store: Store, held_out: Any, device: torch.device) -> None:
    """Fold the scale, measure on held-out rows, and seal the run."""
    fold_scale_(member.sae, member.scaling.scale)
    held = measure(member.sae, store, held_out, device).numbers() if len(held_out) else {}
    result = {
        "format": 1,
        "rows_seen": member.run.config.rows,
        "train": {name: value for name, value in member.latest.items() if name not in ("step", "lr")},
        "held_out": held,
        "dead_fraction": member.latest.get("dead_fraction"),
        "dead_window_rows": member.run.config.dead_after_rows,
    }
    finish_run(member.run, member.sae, result)


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device and threads, for people who want to redo a run."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("actstore", "torch", "numpy", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"versions": versions, "device": str(device), "device_name": name, "threads": torch.get_num_threads()}
