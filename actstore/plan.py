"""What a capture will write, known before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actstore import durable
from actstore.backends import Backend
from actstore.errors import DiskFull, UsageError
from actstore.limits import MIN_FREE_BYTES
from actstore.link import linkable
from actstore.pipeline import QUEUED_GROUPS
from actstore.progress import Plan
from actstore.reader import Store
from actstore.writer import StoreWriter
from actstore.zarr_array import row_dtype


def make_plan(writers: list[StoreWriter], sources: list[list[Store]], backend: Backend, stores: Path) -> Plan:
    """Return the plan of a capture.

    Args:
        writers: one a hook point.
        sources: for each of them the stores whose row groups it can share.
        backend: the model, not loaded.
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
        writers[0].rows, listed, sum(one["missing_bytes"] for one in listed), durable.free_bytes(stores),
        _memory_bytes(writers, backend), available_memory(),
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


def _memory_bytes(writers: list[StoreWriter], backend: Backend) -> int:
    groups = sum(w.group_rows * w.d_model * row_dtype(w.key.dtype).itemsize for w in writers)
    weights = backend.weight_bytes([w.key.hook for w in writers]) if backend.device in ("cpu", "mps") else 0
    return weights + groups * (QUEUED_GROUPS + 2) + 8 * writers[0].rows  # one is filled, one is written


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
