"""One pass over a store trains a fleet of SAEs: the same batch to each, each with its own optimizer and run folder.

A run continues bit for bit (CPU, same thread count): batches are a function of (shuffle seed, step), and a checkpoint
holds everything else. SAEs of a fleet may stand at different steps; each takes part from its own step on.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actstore.catalog import reading
from actstore.errors import UsageError
from actstore.reader import Store
from trainer.architectures import chosen_options, full_name
from trainer.batches import Batches, split_rows
from trainer.checkpoint import create_run, finish_run, read_run, runs_folder
from trainer.config import FitConfig, SaeConfig, resolve
from trainer.distributed import ALONE, ONE, Mesh, Parallel, Ranks
from trainer.initialize import centre_of
from trainer.member import Member, Scaling, open_member, rows_of_step, state_of, train_step
from trainer.memory import chosen_device, passes
from trainer.metrics import measure
from trainer.normalize import fold_, normalization
from trainer.order import companions, make_order
from trainer.parallel import chosen_mesh, claim, memory_share, share_of, wait_for
from trainer.sae import tensors_of
from trainer.shards import save_checkpoint
from trainer.sources import Sources, as_sources, joined, to_tensor

SAMPLE_ROWS = 8192  # first rows of the order: scale, centre and variance are taken of them
CHECKPOINT_SECONDS = 300.0
CHECKPOINT_SHARE = 0.01  # of the time; where writing takes longer than 3 s, checkpoints become rarer


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
        on_start: called with a description of the work, once a pass over the rows: one, unless memory is short.
        on_step: called in every step with (rows of the batch, latest numbers of each SAE).
        stop: asked between steps; an exception it returns is raised after a checkpoint of every SAE.
    """

    on_start: Callable[[dict[str, Any]], None] = field(default=lambda about: None)
    on_step: Callable[[int, list[dict[str, float]]], None] = field(default=lambda rows, latest: None)
    stop: Callable[[], BaseException | None] = field(default=lambda: None)


def fit(
    stores: Store | Sources, config: FitConfig, runs: Path | str | None = None, *, device: str = "auto", kernel: str = "auto",
    max_memory: int | None = None, progress: FitProgress | None = None, parallel: Parallel = "auto", ranks: Ranks = ONE,
) -> list[FitResult]:  # fmt: skip
    """Train every SAE of a fleet from one pass over a store; finished runs cost nothing, started ones go on.

    Args:
        stores: an open store, or row-aligned ones for crosscoders and transcoders.
        config: the fleet.
        runs: folder of runs; default $ACTSTORE_RUNS, else ./runs.
        device: "auto", "cpu", "cuda" or "mps".
        kernel: "auto", "reference" or "fast".
        max_memory: bytes for the SAEs trained at once; a fleet that takes more is trained in several passes over the
            rows. None for nine tenths of what is available.
        progress: callbacks.
        parallel: how several ranks share the work: "fleet", each trains some of the SAEs; "data", each takes a share of
            every batch; "latents", each holds a share of every SAE's latents; "auto".
        ranks: this process among those of the fit; see `distributed.connected`.

    Returns: a result for each SAE, in the order of the comma lists.
    Raises: UsageError, StoreLocked, StoreDamaged, DiskFull, StorageFailed; TrainingDiverged: a loss is not finite;
        RankLost: another rank ended or does not answer.
    """
    progress, folder = progress or FitProgress(), runs_folder(runs)
    config = replace(config, arch=tuple(map(full_name, config.arch)))
    where = chosen_device(device)
    sources = as_sources(stores)
    store, widths = sources.first, sources.widths
    if config.skip and widths.targets is None:
        raise UsageError("a skip connection needs a target store", do="leave out --skip, or name a --target-store")
    split = split_rows(store, config)
    saes = resolve(config, widths.d_in, split.n_train, chosen_options(config))
    limit = max_memory or memory_share(where, ranks)
    mesh = chosen_mesh(parallel, ranks, saes, widths, limit)
    order = make_order(split.n_train, sources.row_bytes, saes[0], sources.chunk_rows)
    batches = Batches(sources, split, order, config.batch_size)
    with contextlib.ExitStack() as locks:
        held = [locks.enter_context(reading(each)) for each in sources.stores]
        groups: list[list[int]] = []
        run_of, unfinished, mine = claim(lambda sae: create_run(folder, sae, sources), saes, mesh, ranks, locks)
        if mine:
            for run in mine if mesh.world.rank == 0 else []:
                run.write("environment.json", environment(where, ranks))
            groups = passes([share_of(run.config, mesh) for run in mine], widths, limit)
            scaling = _scaling(batches, config, where)
            spread, ideal = companions(batches.order, config.batch_size, store.rows / split.documents)
        for number, group in enumerate(groups):
            members = [open_member(mine[i], scaling, where, kernel, mesh) for i in group]
            about = _described(members, batches, number + 1, len(groups))
            progress.on_start({**about, "locked": all(held), "companions": spread, "ideal_companions": ideal})
            _train(members, batches, where, progress)
            for member in members:
                _finish(member, sources, split.held_out, where)
    if mesh is ALONE:
        wait_for(unfinished, progress.stop, ranks)
    results = {run.digest: read_run(run.path).finished() for run in run_of.values()}
    new = {run.digest for run in unfinished}
    digests = [run_of[sae].digest for sae in saes]
    return [FitResult(d, s, results[d], d not in new) for d, s in zip(digests, saes, strict=True)]


def _described(members: list[Member], batches: Batches, number: int, passes: int) -> dict[str, Any]:
    """Return what is told of a pass over the rows before it begins."""
    config, split = members[0].run.config, batches.split
    return {
        "saes": len(members), "steps": config.steps, "rows": config.rows, "train_rows": split.n_train,
        "held_out_rows": len(split.held_out), "batch_size": config.batch_size, "device": str(members[0].scaling.centre.device),
        "kernels": sorted({m.kernel.__name__.rsplit(".", 1)[-1] for m in members}),
        "first_step": min(m.step for m in members), "pass": number, "passes": passes, "runs": [m.run.digest for m in members],
        "complaints": [line for m in members for line in m.complaints],
    }  # fmt: skip


def _scaling(batches: Batches, config: FitConfig, device: torch.device) -> Scaling:
    """Return what the first rows of the order say: normalisation, centre, variance (a median: massive rows do not count)."""
    positions = batches.order.rows_of_window(0, 0)[:SAMPLE_ROWS]
    rows = np.sort(positions if batches.split.train is None else batches.split.train[positions])
    sources, parts, normals = batches.sources, [], []
    for store in sources.stores:
        part = to_tensor(store.take("acts", rows)).to(device, torch.float32)
        normals.append(normalization(store, part, config.normalize))
        parts.append((part - normals[-1].shift) * normals[-1].scale)
    sample = joined(parts, len(sources.inputs))
    of_target = centre_of(sample.y, config.centre)
    variance = float((sample.y - of_target).square().sum(dim=1).median())
    of_input = None if sources.targets is None else centre_of(sample.x, config.centre)
    least = torch.finfo(torch.float32).tiny
    return Scaling(tuple(normals), len(sources.inputs), sample, of_target, of_input, max(variance, least))


def _train(members: list[Member], batches: Batches, device: torch.device, progress: FitProgress) -> None:
    """Run all remaining steps; checkpoint by time, and before an interruption."""
    first, saved, centre = min(m.step for m in members), time.monotonic(), members[0].scaling.centre
    pause, config, mesh = CHECKPOINT_SECONDS, members[0].run.config, members[0].sae.mesh
    scaling = members[0].scaling
    for step, parts in enumerate(batches.iterate(first, config.rows, device, scaling.factors, mesh.rows), first):
        batch = scaling.batch(parts)
        squared_norm = squared_distance(batch.y, centre)
        for member in members:
            if member.step == step:
                train_step(member, batch, squared_norm)
        progress.on_step(rows_of_step(config, step), [m.latest for m in members])
        wanted, due = _agreed(progress.stop(), time.monotonic() - saved > pause, mesh)
        if wanted is not None or due:
            begun = time.monotonic()
            for member in members if mesh.rows.rank == 0 else []:
                save_checkpoint(member.run, member.step, state_of(member), member.latest, mesh.latents)
            saved = time.monotonic()
            pause = max(CHECKPOINT_SECONDS, (saved - begun) / CHECKPOINT_SHARE)
        if wanted is not None:
            raise wanted


def _agreed(wanted: BaseException | None, due: bool, mesh: Mesh) -> tuple[BaseException | None, bool]:
    """Return why to stop and whether a checkpoint is due, the same on every rank: any may ask to stop, rank 0 has the clock."""
    if mesh.world.world == 1:
        return wanted, due
    most = mesh.world.largest(2 if wanted is not None else int(due and mesh.world.rank == 0), "the end of a step")
    return wanted or (KeyboardInterrupt() if most == 2 else None), most > 0


def _finish(member: Member, sources: Sources, held_out: Any, device: torch.device) -> None:
    """Fold the normalisation, measure on held-out rows, and seal the run."""
    fold_(member.sae, member.scaling.of_input, member.scaling.of_target)
    held = measure(member.sae, sources, held_out, device).numbers() if len(held_out) else {}
    result = {
        "format": 1,
        "rows_seen": member.run.config.rows,
        "train": {name: value for name, value in member.latest.items() if name not in ("step", "lr")},
        "held_out": held,
        "dead_fraction": member.latest.get("dead_fraction"),
        "dead_window_rows": member.run.config.dead_after_rows,
    }
    tensors, mesh = tensors_of(member.sae), member.sae.mesh
    for name in tensors:
        if name in member.sae.latentwise:
            whole = mesh.latents.collect(tensors[name], member.sae.config.n_latents, f"the shards of {name}")
            tensors[name] = tensors[name] if whole is None else whole
    if mesh.world.rank == 0:
        finish_run(member.run, tensors, result)
    mesh.world.barrier("rank 0 to finish the run")


def squared_distance(rows: torch.Tensor, point: torch.Tensor) -> float:
    """Return the summed squared distance of (n, d_model) rows from a point, in two passes over the rows.

    Example:
        >>> squared_distance(torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([0.0, 1.0]))
        3.0
    """
    total, norm = rows.sum(0).double(), float(torch.linalg.vector_norm(rows))
    return norm**2 - 2 * float(total @ point.double()) + len(rows) * float(point.double().square().sum())


def environment(device: torch.device, ranks: Ranks = ONE) -> dict[str, Any]:
    """Return versions, device, threads and ranks, for people who want to redo a run."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("actstore", "torch", "numpy", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"versions": versions, "device": str(device), "device_name": name, "threads": torch.get_num_threads()}
    return found if ranks.world == 1 else {**found, "ranks": ranks.world}
