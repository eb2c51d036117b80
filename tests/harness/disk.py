"""A model of a disk that keeps only what was synced: what a power loss may leave, from the recorded operations.

Names: an entry added to, changed in or removed from a folder is pending until that folder is synced; at a power loss
any subset of the pending changes is there. A rename of a folder is one change, as on every journaling file system; a
rename of a file may leave both names, never neither. Data: what was written to a file is pending until it is synced;
at a power loss the file may be empty, cut, zeros of full length, or whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

Tree = dict[str, bytes | None]  # path below the root -> content, None for a folder
KEPT_TEMPORARIES = 3  # finished temporary files whose names may still be on the disk
VARIANTS = ("empty", "cut", "zeros", "whole")


@dataclass(eq=False)
class Node:
    """A file or folder, named by the entries that point to it."""

    data: bytes | None = None  # None: a folder
    synced: bool = True
    entries: dict[str, Node] = field(default_factory=dict)  # a folder's durable entries


@dataclass(eq=False)
class Change:
    """A pending change of names: each part is (folder, name, the node it then has, or None)."""

    parts: list[tuple[Node, str, Node | None]]
    needs: Change | None = None  # present only if this one is


@dataclass
class Disk:
    """What is durable and what is pending.

    Args:
        fsync: whether fsync of a file counts; False is a control.
        fsync_folder: whether fsync of a folder counts; False is a control.
    """

    fsync: bool = True
    fsync_folder: bool = True
    root: Node = field(default_factory=Node)
    pending: list[Change] = field(default_factory=list)

    def now(self, folder: Node) -> dict[str, Node]:
        """Return a folder's entries as a running process sees them: durable ones and all pending changes."""
        entries = dict(folder.entries)
        for change in self.pending:
            _apply(entries, folder, change)
        return entries

    def find(self, path: str) -> Node:
        """Return the node of a path. Raises: KeyError."""
        node = self.root
        for name in path.split("/"):
            node = self.now(node)[name]
        return node

    def folder(self, path: str) -> tuple[Node, str]:
        """Return a path's folder and last name."""
        parent, _, name = path.rpartition("/")
        return (self.find(parent) if parent else self.root), name

    def change(self, *changes: tuple[str, Node | None], needs: Change | None = None) -> Change:
        """Make changes of names, together, pending."""
        made = Change([(*self.folder(path), node) for path, node in changes], needs)
        self.pending.append(made)
        return made

    def sync_folder(self, path: str) -> None:
        """Make every pending change that touches a folder durable."""
        folder = self.find(path) if path else self.root
        kept = []
        for change in self.pending:
            if self.fsync_folder and any(part[0] is folder for part in change.parts):
                for touched in {id(p[0]): p[0] for p in change.parts}.values():
                    _apply(touched.entries, touched, change)
            else:
                kept.append(change)
        self.pending = kept

    def remove_tree(self, path: str) -> None:
        """Remove a folder and all in it, each entry a change of its own."""
        for name, node in self.now(self.find(path)).items():
            if node.data is None:
                self.remove_tree(f"{path}/{name}")
            else:
                self.change((f"{path}/{name}", None))
        self.change((path, None))


def _apply(entries: dict[str, Node], folder: Node, change: Change) -> None:
    for where, name, node in change.parts:
        if where is folder and node is None:
            entries.pop(name, None)
        elif where is folder and node is not None:
            entries[name] = node


def load(folder: Path) -> Node:
    """Return a folder of the real disk as a durable node."""
    node = Node()
    for entry in os.scandir(folder):
        node.entries[entry.name] = load(Path(entry)) if entry.is_dir() else Node(Path(entry).read_bytes())
    return node


def losses(disk: Disk, limit: int, rng: random.Random) -> Iterator[Tree]:
    """Yield what a power loss now may leave: all subsets of the newest changes, each with a sample of the older ones.

    At most `limit` subsets, a power of two; the variants of unsynced data are sampled where they are more than that.
    """
    n, newest = len(disk.pending), min(len(disk.pending), limit.bit_length() - 1)
    subsets: Any = ((*(rng.random() < 0.5 for _ in range(n - newest)), *new) for new in product((False, True), repeat=newest))
    for subset in subsets:
        kept = [c for c, there in zip(disk.pending, subset, strict=True) if there]
        if any(c.needs is not None and c.needs in disk.pending and c.needs not in kept for c in kept):
            continue
        tree, unsynced = _tree(disk.root, kept)
        choices: Any = product(VARIANTS, repeat=len(unsynced))
        if 4 ** len(unsynced) > limit:
            choices = [tuple(rng.choice(VARIANTS) for _ in unsynced) for _ in range(8)]
        for choice in choices:
            yield tree | {p: _variant(tree[p] or b"", v) for p, v in zip(unsynced, choice, strict=True)}


def _variant(data: bytes, name: str) -> bytes:
    return {"empty": b"", "cut": data[: len(data) // 2], "zeros": bytes(len(data)), "whole": data}[name]


def _tree(root: Node, changes: list[Change]) -> tuple[Tree, list[str]]:
    """Return every path with its content, and the paths of files whose data is not synced."""
    tree: Tree = {}
    unsynced: list[str] = []

    def walk(folder: Node, prefix: str) -> None:
        entries = dict(folder.entries)
        for change in changes:
            _apply(entries, folder, change)
        for name, node in sorted(entries.items()):
            tree[prefix + name] = node.data
            if node.data is None:
                walk(node, f"{prefix}{name}/")
            elif not node.synced:
                unsynced.append(prefix + name)

    walk(root, "")
    return tree, unsynced


class Recorder:
    """Feeds a `Disk` from `durable.step_hook`, which is called just before each call.

    `events` counts the calls completed; `at` is called before each with the disk as it is then.
    """

    def __init__(self, disk: Disk, root: Path) -> None:
        self.disk, self.base = disk, str(root) + "/"
        self._open: dict[int, tuple[str, Path, Change]] = {}  # of each thread: its temporary file, and its appearance
        self._next: Any = None
        self._temporaries = 0
        self._old: list[tuple[Change, Change]] = []  # appearance and disappearance of finished temporary files

    def hook(self, name: str, path: Path) -> None:
        """Take one announced call: first what the call before has done, then remember this one."""
        self.settle()
        self._next = (name, path, threading.get_ident())
        if name == "fsync" and threading.get_ident() in self._open:  # written by now, and read before it is renamed
            temporary, real, _ = self._open[threading.get_ident()]
            self.disk.find(temporary).data = real.read_bytes()
        if name == "rename" and threading.get_ident() not in self._open:
            self._next = ("rename-dir", path, self._source(path))

    def _source(self, target: Path) -> str:
        """Return which folder is about to be renamed to `target`: the store's, or its staging folder."""
        stores = target.parent.parent if target.parent.name == ".trash" else target.parent
        sealed, staging = stores / target.name, stores / ".staging" / target.name
        return self._name(sealed if sealed.is_dir() else staging)

    def _name(self, path: Path) -> str:
        return str(path)[len(self.base) :]

    def _forget_temporaries(self) -> None:
        """Take the pending names of all but the last few temporary files as never written to disk.

        Each could be there or not, alone or beside its final name, and all of them are deleted unread at the next
        start: without a bound nearly all states would differ in nothing else.
        """
        while len(self._old) > KEPT_TEMPORARIES:
            dropped = self._old.pop(0)
            self.disk.pending = [change for change in self.disk.pending if change not in dropped]

    def settle(self) -> None:
        """Apply the call announced last, which has been made by now."""
        if self._next is None:
            return
        (name, path, extra), self._next = self._next, None
        disk, where = self.disk, self._name(path)
        match name:
            case "mkdir":
                disk.change((where, Node()))
            case "fsync-folder":
                disk.sync_folder(where)
            case "open":
                self._forget_temporaries()
                self._temporaries += 1  # the real name is random: states are compared by content
                temporary = f"{where.rpartition('/')[0]}/{self._temporaries}"
                made = disk.change((temporary, Node(b"", synced=False)))
                self._open[extra] = temporary, path, made
            case "fsync":
                disk.find(self._open[extra][0]).synced |= disk.fsync
            case "rename":
                temporary, _, made = self._open.pop(extra)
                added = disk.change((where, disk.find(temporary)))
                self._old.append((made, disk.change((temporary, None), needs=added)))
            case "rename-dir":
                disk.change((where, disk.find(extra)), (extra, None))
            case "unlink":
                if path.name in disk.now(disk.folder(where)[0]):
                    disk.change((where, None))
            case "remove-tree":
                with contextlib.suppress(KeyError):  # nothing there
                    disk.find(where)
                    disk.remove_tree(where)
