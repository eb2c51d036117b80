"""What is wrong with a store: every finding of one run, never a repair by guess."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore.digests import sha256_file
from actstore.errors import ActstoreError
from actstore.files import opened
from actstore.layout import MANIFEST, arrays_of, chunk_name, record_name
from actstore.reader import Store, open_unchecked
from actstore.sealed import small_file_problems

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class CheckReport:
    """What `check_store` found.

    Args:
        digest: the store digest.
        row_groups: row groups looked at.
        data: whether chunk contents were read and digested.
        findings: one sentence each; none means the store is whole.
        damaged: the row groups with a finding.
    """

    digest: str
    row_groups: int
    data: bool
    findings: list[str] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "digest": self.digest, "row_groups": self.row_groups, "data": self.data,
            "ok": not self.findings, "findings": self.findings, "damaged_row_groups": self.damaged,
        }  # fmt: skip


def check_store(path: Path, data: bool = False, progress: Progress = lambda done, total: None) -> CheckReport:
    """Check a sealed store: structure always, every byte against its SHA-256 with `data`.

    Args:
        path: the store's folder.
        data: also read and digest all chunks (about 1.5 GB/s).
        progress: called with (row groups done, row groups in all).

    Returns: the report; damage is a finding, not an exception.
    Raises: StoreNotSealed: no manifest. FormatError: the manifest itself cannot be trusted, so nothing can be checked.
    """
    store = open_unchecked(path)
    groups = len(store.manifest.groups)
    report = CheckReport(store.digest, groups, data)
    report.findings += small_file_problems(path, store.manifest, store.statistics).values()
    for group in range(groups):
        found = group_findings(store, group, data)
        report.findings += found
        report.damaged += [group] if found else []
        progress(group + 1, groups)
    report.findings += [f"extra file {ascii(name)[1:-1]}" for name in _extra_files(store)]
    return report


def group_findings(store: Store, group: int, data: bool) -> list[str]:
    """Return what is wrong with one row group, one sentence each; see `check_store`."""
    try:
        record = store.record(group)
    except ActstoreError as error:
        return [f"{error.what} ({error.where})"]
    findings = []
    for array in arrays_of(store.dtype):
        name = chunk_name(array, group)
        sha256 = record.chunks[array].sha256  # type: ignore[index]
        try:
            with opened(store.path, name) as (descriptor, size):
                if problem := store.size_problem(array, group, size):
                    findings.append(f"chunk {name} {problem}")
                elif data and (found := sha256_file(store.path / name, descriptor)) != sha256:
                    findings.append(f"chunk {name} has digest {found[:12]}…, its record says {sha256[:12]}…")
        except FileNotFoundError:
            findings.append(f"chunk {name} is missing")
        except ActstoreError as error:  # no regular file, or a sector that cannot be read
            findings.append(f"chunk {name}: {error.what}")
    return findings


def _extra_files(store: Store) -> list[str]:
    """Return what lies in the folder without belonging to the store: files, folders, links of any kind."""
    groups = range(len(store.manifest.groups))
    arrays = arrays_of(store.dtype)
    expected = {MANIFEST, *store.manifest.files, *arrays, "row_groups"}
    expected |= {chunk_name(array, i) for array in arrays for i in groups} | {record_name(i) for i in groups}
    found = set()
    for folder, folders, names in os.walk(store.path):
        found |= {str(Path(folder, name).relative_to(store.path)) for name in (*folders, *names)}
    return sorted(found - expected)
