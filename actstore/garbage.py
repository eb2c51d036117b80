"""What may be deleted without losing a store: unsealed leftovers, trash, and the scratch places of repairs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from actstore import durable
from actstore.catalog import digests_in, discard
from actstore.errors import StoreLocked
from actstore.layout import StorePaths
from actstore.sealed import committed_groups

Kind = Literal["unsealed", "trash", "scratch", "claims"]


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
    kind: Kind
    path: Path
    bytes: int
    row_groups: int
    held_by: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the leftover as JSON values."""
        return asdict(self) | {"path": str(self.path), "held_by": self.held_by or None}


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
                if not dry_run and kind == "unsealed":
                    discard(folder, paths.trash)
                elif not dry_run:
                    durable.remove_tree(folder)
        except StoreLocked as error:
            held = error.what
        found.append(Leftover(paths.digest, kind, folder, size, groups, held))
    return found


def _leftovers(stores: Path) -> list[tuple[StorePaths, Kind, Path]]:
    """Return each leftover with the paths of its store."""
    places: list[tuple[Kind, Path, str]] = [
        ("unsealed", stores / ".staging", ""),
        ("trash", stores / ".trash", ""),
        ("scratch", stores / ".repair" / ".staging", ""),
        ("claims", stores / ".locks", ".claims"),
        ("claims", stores / ".repair" / ".locks", ".claims"),
    ]
    return [(StorePaths(stores, d), kind, at / (d + suffix)) for kind, at, suffix in places for d in digests_in(at, suffix)]


def _bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # its capture is running, or another collection
                status = os.lstat(Path(parent, name))
                total += status.st_size if status.st_nlink == 1 else 0
    return total
