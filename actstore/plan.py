"""What a capture will write, known before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.corpus import ReadReport
from actstore.errors import DiskFull
from actstore.limits import MIN_FREE_BYTES
from actstore.link import linkable
from actstore.reader import Store
from actstore.sequences import Sequences
from actstore.writer import StoreWriter


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
    """

    rows: int
    sequences: int
    documents: int
    empty: int
    bad: int
    stores: list[dict[str, Any]]
    needed_bytes: int
    free_bytes: int


def make_plan(
    writers: list[StoreWriter], sources: list[list[Store]], sequences: Sequences, rows: int, report: ReadReport, stores: Path
) -> Plan:
    """Return the plan of a capture.

    Args:
        writers: one a hook point.
        sources: for each of them the stores whose row groups it can share.
        sequences: the corpus, cut.
        rows: rows asked for.
        report: what reading the corpus found.
        stores: folder of stores.

    Raises: DiskFull: the disk cannot hold what is missing and keep MIN_FREE_BYTES free.
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
    )  # fmt: skip
    if plan.needed_bytes + MIN_FREE_BYTES > plan.free_bytes:
        raise DiskFull(
            f"the capture needs {plan.needed_bytes / 1e9:.2f} GB (and {MIN_FREE_BYTES / 1e9:.2f} GB to spare), "
            f"{plan.free_bytes / 1e9:.2f} GB are free",
            where=str(stores),
            do="make space, name another --stores folder, or ask for fewer --rows or a narrower --dtype",
        )
    return plan
