"""What may be deleted without losing a store: unsealed leftovers, trash, and the scratch places of repairs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actstore import durable
from actstore.catalog import digests_in
from actstore.errors import StoreLocked
from actstore.layout import StorePaths
from actstore.sealed import committed_groups


@dataclass(frozen=True, slots=True)
class Leftover:
    """One folder that `actstore gc` may delete.

    Args:
        digest: of the store it was to become or has been.
        kind: an unsealed store, a removed one whose deletion was interrupted, a repair's scratch place, or the lock
            files of captures that are over.
        path: the folder.
        bytes: of the files in it; what a file shares with a sealed store by a hard link is not counted.
        row_groups: committed ones, which a repeated capture would go on from.
        held_by: why it must stay, or "".
    """

    digest: str
    kind: Literal["unsealed", "trash", "scratch", "claims"]
    path: Path
    bytes: int
    row_groups: int
    held_by: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the leftover as JSON values."""
        return {
            "digest": self.digest, "kind": self.kind, "path": str(self.path), "bytes": self.bytes,
            "row_groups": self.row_groups, "held_by": self.held_by or None,
        }  # fmt: skip


def collect(stores: Path, dry_run: bool = False) -> list[Leftover]:
    """Delete every leftover that nobody holds; sealed stores are never touched, and no clock decides.

    Args:
        stores: folder of stores.
        dry_run: only report.

    Returns: what was deleted (or would be), and what stays because a process holds it.
    Raises: StorageFailed: it could not be deleted; run it again.
    """
    found = []
    for paths, kind, folder in _leftovers(stores):
        held = ""
        size, groups = _bytes(folder), committed_groups(folder)
        try:
            with durable.lock(paths.lock, f"a garbage collection, pid {os.getpid()}"):
                if not os.path.lexists(folder):  # another collection was faster, or its capture has sealed it
                    continue
                if not dry_run:
                    _delete(paths, kind, folder)
        except StoreLocked as error:
            held = error.what
        found.append(Leftover(paths.digest, kind, folder, size, groups, held))
    return found


Kind = Literal["unsealed", "trash", "scratch", "claims"]


def _leftovers(stores: Path) -> list[tuple[StorePaths, Kind, Path]]:
    """Return each leftover with the paths of its store."""
    found: list[tuple[StorePaths, Kind, Path]] = []
    kinds: list[tuple[Kind, Path]] = [
        ("unsealed", stores / ".staging"),
        ("trash", stores / ".trash"),
        ("scratch", stores / ".repair" / ".staging"),
    ]
    for kind, parent in kinds:
        found += [(StorePaths(stores, digest), kind, parent / digest) for digest in digests_in(parent)]
    for scratch in (stores, stores / ".repair"):
        names = [name.removesuffix(".claims") for name in _names(scratch / ".locks") if name.endswith(".claims")]
        found += [(StorePaths(stores, d), "claims", scratch / ".locks" / f"{d}.claims") for d in names if len(d) == 64]
    return found


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _delete(paths: StorePaths, kind: Kind, folder: Path) -> None:
    """Delete one leftover; an unsealed store leaves its place first, so that nobody resumes from half of it."""
    if kind == "unsealed":
        durable.remove_tree(paths.trash)
        durable.make_dir(paths.trash.parent)
        durable.rename_dir(folder, paths.trash)
        folder = paths.trash
    durable.remove_tree(folder)


def _bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # its capture is running, or another collection
                status = os.lstat(Path(parent, name))
                total += status.st_size if status.st_nlink == 1 else 0
    return total
