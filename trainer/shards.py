"""Checkpoints of a run: what training changes, in one file or in one a rank; the newest that verifies is resumed from.

checkpoints/<step>.safetensors       everything; where latents are spread over ranks, rank 0's share of them
checkpoints/<step>.<i>.safetensors   rank i's share: a contiguous range of latents, and what is no latent's, alike in all
checkpoints/<step>.json              written last, with all digests: the commit point. The last two checkpoints are kept.

The ranges follow from the number of shards, so any number of ranks loads what any other number wrote.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from actstore import durable
from actstore.digests import sha256_pieces
from actstore.errors import FormatError
from actstore.files import read_bounded
from actstore.limits import MAX_CONFIG_BYTES, MAX_METRICS_BYTES
from trainer.checkpoint import Run
from trainer.distributed import ALONE, ONE, Mesh, Ranks
from trainer.saved import Commit, Shapes, read_record, read_tensors, tensor_pieces

KEPT_CHECKPOINTS = 2
Found = tuple[int, dict[str, Tensor], dict[str, int | float]]


def _name(step: int, shard: int) -> str:
    return f"checkpoints/{step}.{shard}.safetensors" if shard else f"checkpoints/{step}.safetensors"


def save_checkpoint(
    run: Run, step: int, tensors: dict[str, Tensor], scalars: dict[str, int | float], latents: Ranks = ONE
) -> None:
    """Commit a checkpoint: tensors first, then the small file with their digests; older ones than the last two go.

    Args:
        run: the run.
        step: steps done.
        tensors: everything that changes while training, of this rank's latents.
        scalars: JSON values kept beside.
        latents: the ranks that the latents are spread over; each calls this.
    """
    metrics = run.path / "metrics.jsonl"
    metrics_bytes = durable.sync_file(metrics) if not latents.rank and metrics.exists() else 0
    data = tensor_pieces({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    digest = sha256_pieces(data)
    durable.write_new(run.path, _name(step, latents.rank), data, replace=True)
    mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
    shards = [part.numpy().tobytes().hex() for part in latents.gather(mine, f"the shards of checkpoint {step}")]
    if latents.rank == 0:
        commit = {"step": step, "sha256": digest, "metrics_bytes": metrics_bytes, "scalars": scalars}
        if len(shards) > 1:
            commit["shards"] = shards[1:]
        run.write(f"checkpoints/{step}.json", commit)
        _drop_old(run)


def _drop_old(run: Run) -> None:
    """Delete what belongs to none of the kept checkpoints, commits first."""
    folder = run.path / "checkpoints"
    kept = {str(step) for step in _steps(run)[:KEPT_CHECKPOINTS]}
    old = [name for name in os.listdir(folder) if name.partition(".")[0] not in kept]
    for name in sorted(old, key=lambda name: not name.endswith(".json")):
        durable.remove_file(folder / name)


def _steps(run: Run) -> list[int]:
    """Return the steps of the committed checkpoints, newest first."""
    folder = run.path / "checkpoints"
    if not folder.is_dir():
        return []
    names = (name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json"))
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def load_checkpoint(
    run: Run, expected: Shapes, complaints: list[str], latentwise: frozenset[str] = frozenset(), mesh: Mesh = ALONE
) -> Found | None:
    """Return (step, tensors, scalars) of the newest checkpoint that verifies on every rank, or None.

    Args:
        run: the run.
        expected: name, shape and dtype of each tensor, all latents together; a checkpoint with others is refused.
        complaints: one line is added for each newer checkpoint that is not used.
        latentwise: names of the tensors with a row for each latent; of these the ones of this rank are returned.
        mesh: the ranks, each of which calls this.

    The metrics file is cut back to its length at that checkpoint.
    """
    steps = _steps(run)
    for i in range(mesh.world.total(len(steps) if mesh.world.rank == 0 else 0, "the number of checkpoints")):
        step = int(mesh.world.same_(torch.tensor(steps[i] if i < len(steps) else -1), "the checkpoint to resume from"))
        found = None
        try:
            commit = read_record(Commit, run.path, f"checkpoints/{step}.json", MAX_CONFIG_BYTES)
            tensors = _read(run, step, [commit.sha256, *commit.shards], expected, latentwise, mesh.latents)
            if mesh.world.rank == 0:
                _cut_metrics(run, commit.metrics_bytes)
            found = step, tensors, dict(commit.scalars)
        except (FormatError, FileNotFoundError) as error:
            complaints.append(f"run {run.digest[:12]}: checkpoint {step} is not used: {error}")
        refused = mesh.world.total(found is None, "whether the checkpoint can be used")
        if not refused:
            return found
        if found:
            complaints.append(f"run {run.digest[:12]}: checkpoint {step} is not used: {refused} other ranks cannot read it")
    if mesh.world.rank == 0:
        _cut_metrics(run, 0)
    return None


def _read(
    run: Run, step: int, digests: list[str], expected: Shapes, latentwise: frozenset[str], latents: Ranks
) -> dict[str, Tensor]:
    """Return a rank's part of a checkpoint, from the shards that hold it."""
    if len(digests) == latents.world == 1:
        return read_tensors(run.path, _name(step, 0), expected, digests[0])
    n = expected["since_active"][0][0]
    mine, parts, common = latents.share(n), [], {}
    for shard, digest in enumerate(digests):
        its = latents.share(n, shard, len(digests))
        begin, end = max(mine.start, its.start), min(mine.stop, its.stop)
        if begin >= end:
            continue
        shapes = {name: ((len(its), *s[1:]) if name in latentwise else s, dtype) for name, (s, dtype) in expected.items()}
        common = read_tensors(run.path, _name(step, shard), shapes, digest)
        # Copies: a view of a few rows would keep the whole shard in memory.
        parts.append({name: common.pop(name)[begin - its.start : end - its.start].clone() for name in sorted(latentwise)})
    return {**common, **{name: torch.cat([part.pop(name) for part in parts]) for name in sorted(latentwise)}}


def _cut_metrics(run: Run, length: int) -> None:
    path = run.path / "metrics.jsonl"
    if path.exists() and path.stat().st_size != length:
        data = read_bounded(run.path, "metrics.jsonl", MAX_METRICS_BYTES)
        if len(data) < length:
            raise FormatError("metrics.jsonl is shorter than at the checkpoint", where=str(path))
        durable.write_new(run.path, "metrics.jsonl", [data[:length]], replace=True)
