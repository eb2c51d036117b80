"""What a capture will write, known before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.backends import Backend
from actstore.corpus import ReadReport
from actstore.errors import DiskFull, UsageError
from actstore.limits import MIN_FREE_BYTES
from actstore.link import linkable
from actstore.pipeline import QUEUED_GROUPS
from actstore.reader import Store
from actstore.sequences import Sequences
from actstore.writer import StoreWriter
from actstore.zarr_array import row_dtype


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture will write.

    Args:
        rows: rows of each store.
        sequences: sequences the model will run.
        documents, empty, bad: documents used, left out as empty, skipped as bad.
        stores: for each hook point its store digest, d_model, dtype, row groups in all, committed already and shared
            with another store, and bytes still to write.
        needed_bytes: bytes still to write in all.
        free_bytes: bytes free where the stores lie.
        memory_bytes: memory for weights, row groups on their way to the disk, and token ids; the weights count where
            the model runs in main memory. The runtime and the model's activations come on top.
        available_bytes: memory that this machine can give now; None where it does not say.
    """

    rows: int
    sequences: int
    documents: int
    empty: int
    bad: int
    stores: list[dict[str, Any]]
    needed_bytes: int
    free_bytes: int
    memory_bytes: int
    available_bytes: int | None


def make_plan(
    writers: list[StoreWriter], sources: list[list[Store]], backend: Backend, sequences: Sequences, rows: int,
    report: ReadReport, stores: Path,
) -> Plan:  # fmt: skip
    """Return the plan of a capture.

    Args:
        writers: one a hook point.
        sources: for each of them the stores whose row groups it can share.
        backend: the model, not loaded.
        sequences: the corpus, cut.
        rows: rows asked for.
        report: what reading the corpus found.
        stores: folder of stores.

    Raises: DiskFull: the disk cannot hold what is missing and keep MIN_FREE_BYTES free. UsageError: the memory does not
        suffice for the weights and the row groups on their way.
    """
    listed: list[dict[str, Any]] = []
    for writer, shared in zip(writers, sources, strict=True):
        missing = writer.missing_row_groups()
        computed = [i for i in missing if not any(linkable(writer, s, i) for s in shared)]
        listed.append(
            {
                "digest": writer.paths.digest,
                "hook": writer.key.hook,
                "d_model": writer.d_model,
                "dtype": writer.key.dtype,
                "row_groups": writer.n_groups,
                "committed": writer.n_groups - len(missing),
                "linked": len(missing) - len(computed),
                "missing_bytes": len(computed) * writer.group_bytes,
            }
        )
    plan = Plan(
        rows, sequences.covering(0, rows)[1], report.documents, report.empty, report.bad, listed,
        sum(one["missing_bytes"] for one in listed), durable.free_bytes(stores),
        _memory_bytes(writers, backend, sequences), available_memory(),
    )  # fmt: skip
    if plan.needed_bytes + MIN_FREE_BYTES > plan.free_bytes:
        raise DiskFull(
            f"the capture needs {plan.needed_bytes / 1e9:.2f} GB (and {MIN_FREE_BYTES / 1e9:.2f} GB to spare), "
            f"{plan.free_bytes / 1e9:.2f} GB are free",
            where=str(stores),
            do="make space, name another --stores folder, or ask for fewer --rows or a narrower --dtype",
        )
    if plan.available_bytes is not None and plan.memory_bytes > plan.available_bytes:
        needed, there = plan.memory_bytes / 1e9, plan.available_bytes / 1e9
        raise UsageError(
            f"the capture needs at least {needed:.2f} GB of memory, {there:.2f} GB are available",
            do="use a narrower --compute-dtype, an earlier hook point, or a machine with more memory",
        )
    return plan


def _memory_bytes(writers: list[StoreWriter], backend: Backend, sequences: Sequences) -> int:
    groups = sum(w.group_rows * w.d_model * row_dtype(w.key.dtype).itemsize for w in writers)
    weights = backend.weight_bytes([w.key.hook for w in writers]) if backend.device in ("cpu", "mps") else 0
    return weights + groups * (QUEUED_GROUPS + 2) + 8 * sequences.rows  # one is filled, one is written


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
