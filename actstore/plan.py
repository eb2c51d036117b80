"""What a capture will write, known before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actstore.backends import Backend
from actstore.errors import DiskFull, UsageError
from actstore.limits import MIN_FREE_BYTES
from actstore.link import linkable
from actstore.pipeline import QUEUED_GROUPS
from actstore.progress import Plan
from actstore.reader import Store
from actstore.writer import StoreWriter
from actstore.zarr_array import row_dtype


def make_plan(writers: list[StoreWriter], sources: list[list[Store]], backend: Backend, free: int | None, rows: int) -> Plan:
    """Return the plan of a capture, whether it fits or not; see `refuse`.

    Args:
        writers: one for each hook point whose store is not sealed.
        sources: for each of them the stores whose row groups it can share.
        backend: the model, not loaded.
        free: bytes free where the stores will lie; None where that is no limit.
        rows: of each store.
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
    missing = sum(one["missing_bytes"] for one in listed)
    memory, device = _memory_bytes(writers, backend, rows)
    return Plan(rows, listed, missing, free, memory, available_memory(), device)


def refuse(plan: Plan, stores: str) -> None:
    """Raise what keeps a planned capture from being finished.

    Raises: DiskFull: the disk cannot hold what is missing and keep MIN_FREE_BYTES free. UsageError: the memory does not
        suffice for the weights and the row groups on their way.
    """
    if plan.free_bytes is not None and plan.needed_bytes + MIN_FREE_BYTES > plan.free_bytes:
        raise DiskFull(
            f"the capture needs {plan.needed_bytes / 1e9:.2f} GB (and {MIN_FREE_BYTES / 1e9:.2f} GB to spare), "
            f"{plan.free_bytes / 1e9:.2f} GB are free",
            where=stores,
            do="make space, name another --stores folder, or ask for fewer --rows or a narrower --dtype",
        )
    if plan.available_bytes is not None and plan.memory_bytes > plan.available_bytes:
        needed, there = plan.memory_bytes / 1e9, plan.available_bytes / 1e9
        raise UsageError(
            f"the capture needs at least {needed:.2f} GB of memory, {there:.2f} GB are available",
            do="use a narrower --compute-dtype, an earlier hook point, or a machine with more memory",
        )


def _memory_bytes(writers: list[StoreWriter], backend: Backend, rows: int) -> tuple[int, int]:
    """Return the bytes of main memory, and of the device where it has its own."""
    each = [w.group_rows * w.d_model * row_dtype(w.key.dtype).itemsize for w in writers]
    writing = max((w.threads * w.copies for w in writers), default=1)
    groups = sum(each) + (QUEUED_GROUPS + writing) * max(each, default=0)  # each store fills one; others wait, or are written
    weights = backend.weight_bytes([w.key.hook for w in writers]) if writers else 0
    shared = backend.device in ("cpu", "mps")
    return groups + 8 * rows + (weights if shared else 0), 0 if shared else weights


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
