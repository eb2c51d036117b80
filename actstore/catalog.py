"""The folder of stores: list it, find a store by prefix, open it, remove it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from actstore import durable
from actstore.digests import DIGEST, check_prefix
from actstore.errors import ActstoreError, StorageFailed, StoreNotFound, StoreNotSealed, UsageError
from actstore.files import read_bounded
from actstore.key import StoreKey, parse_key
from actstore.layout import KEY, StorePaths, stores_folder
from actstore.limits import MAX_KEY_BYTES
from actstore.manifest import Manifest, seal_manifest
from actstore.reader import Store, open_folder
from actstore.sealed import committed_groups, how_far, read_manifest, read_outline
from actstore.writer import StoreWriter, read_groups


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a listing.

    Args:
        digest: the store digest.
        sealed: whether the store is whole.
        key: what it is derived from; None when its files cannot be read.
        manifest: of a sealed store; None when unsealed or unreadable.
        committed: row groups committed so far, of an unsealed store.
        how_far: the same in words, with the number it will have.
        problem: why it cannot be read, or "".
    """

    digest: str
    sealed: bool
    key: StoreKey | None = None
    manifest: Manifest | None = None
    committed: int = 0
    how_far: str = ""
    problem: str = ""


def digests_in(folder: Path, suffix: str = "") -> list[str]:
    """Return the digests that name something in a folder, sorted, names with another suffix left out.

    An absent folder has none. Raises: StorageFailed.

    Example:
        >>> digests_in(Path("nowhere"))
        []
    """
    try:
        names = (name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix))
        return sorted(filter(DIGEST.fullmatch, names))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageFailed(f"the folder cannot be listed: {error.strerror}", str(folder)) from error


def list_stores(stores: Path) -> list[Listed]:
    """Return every store of a folder, sealed ones first; damage makes a line with a problem, not an exception.

    Raises: StorageFailed: the folder cannot be listed.
    """
    places = [(True, stores), (False, stores / ".staging")]
    return [_listed(folder / digest, sealed) for sealed, folder in places for digest in digests_in(folder)]


def _listed(folder: Path, sealed: bool) -> Listed:
    try:
        if sealed:
            manifest, _ = read_manifest(folder)
            return Listed(folder.name, True, manifest.key, manifest)
        key = parse_key(read_bounded(folder, KEY, MAX_KEY_BYTES))
        return Listed(folder.name, False, key, committed=committed_groups(folder), how_far=how_far(folder))
    except (ActstoreError, OSError) as error:
        return Listed(folder.name, sealed, problem=str(error.args[0]).split("\n")[0])


def find_digest(prefix: str, stores: Path) -> str:
    """Return the digest of the only store, sealed or not, that begins with `prefix`.

    Raises: UsageError: not a prefix, or several stores begin with it. StoreNotFound: none does.
    """
    check_prefix(prefix)
    there = sorted({*digests_in(stores), *digests_in(stores / ".staging")})
    return unique_digest(there, prefix, "store", stores, f"`actstore ls --stores {stores}` lists the stores")


def unique_digest(there: list[str], prefix: str, kind: str, folder: Path | str, do: str) -> str:
    """Return the one digest that begins so. Raises: UsageError: several (listed). StoreNotFound: none (the nearest are named).

    Example:
        >>> unique_digest(["ab" * 32, "cd" * 32], "abab", "store", "stores", "")[:6]
        'ababab'
    """
    found = [digest for digest in there if digest.startswith(prefix)]
    if not found:
        near = get_close_matches(prefix, [digest[: len(prefix)] for digest in there], cutoff=0.7)
        named = f"nearest: {', '.join(dict.fromkeys(near))}; " if near else ""
        raise StoreNotFound(f"no {kind} begins with {prefix}", str(folder), named + do)
    if len(found) > 1:
        names = ", ".join(d[: len(prefix) + 8] for d in found[:8])
        raise UsageError(f"{prefix} is ambiguous: {len(found)} {kind}s begin with it", names, "give more digits")
    return found[0]


def find_sealed(prefix: str, stores: Path) -> Path:
    """Return the folder of a sealed store. Raises: as `find_digest`; StoreNotSealed: it is still unsealed."""
    paths = StorePaths(stores, find_digest(prefix, stores))
    if not paths.sealed.is_dir():
        raise StoreNotSealed(
            f"the store is not sealed: {how_far(paths.staging)}",
            str(paths.staging),
            "run its capture again: it goes on where it stopped",
        )
    return paths.sealed


def open_store(store: str | Path, stores: Path | str | None = None) -> Store:
    """Open a sealed store for reading.

    Args:
        store: a unique prefix of its digest (at least 4 digits), or the path of its folder.
        stores: folder of stores; default $ACTSTORE_STORES, else ./stores. Not used with a path.

    Returns: the store; `store[a:b]` are its rows, memory-mapped, each chunk verified at first touch.
    Raises: UsageError, StoreNotFound, StoreNotSealed, FormatError, StoreDamaged.
    """
    if isinstance(store, Path) or "/" in store:
        folder = Path(store)
        if not folder.is_dir():
            raise StoreNotFound("no such store folder", str(folder), "`actstore ls` lists the stores")
        return open_folder(folder.absolute())
    return open_folder(find_sealed(store, stores_folder(stores)).absolute())


@contextlib.contextmanager
def reading(store: Store) -> Iterator[bool]:
    """Hold a store's shared lock, so that it is not removed meanwhile; yield False where no lock file can be made.

    Raises: StoreLocked: it is being removed or repaired. StorageFailed.
    """
    lock = StorePaths(store.path.parent, store.digest).lock
    nearest = next(path for path in (lock, lock.parent, lock.parent.parent) if path.exists())
    if not os.access(nearest, os.W_OK):  # a read-only medium, or somebody else's folder
        yield False
        return
    with durable.lock(lock, "", shared=True):
        yield True


def open_partial(prefix: str, stores: Path) -> Store:
    """Open the row groups that an unfinished capture has committed, from the first up to the first that is missing.

    For looking, not for training: what it holds is not fixed yet, so it has no place in a run's lineage. The text of
    the tokens is not there before the seal.

    Raises: as `find_digest`; StoreNotFound: no unsealed store of this name. StoreNotSealed: nothing is committed yet.
        FormatError: its files are damaged.
    """
    paths = StorePaths(stores, find_digest(prefix, stores))
    try:
        key, outline = read_outline(paths.staging)
    except FileNotFoundError as error:
        raise StoreNotFound("no capture of this store is under way", str(paths.staging), "leave --partial out") from error
    writer = StoreWriter(paths, key, outline.rows, outline.d_model)
    groups, moments = read_groups(writer)
    if not groups:
        raise StoreNotSealed(f"0 of {writer.n_groups} row groups are committed", str(paths.staging), "wait for the first")
    rows = min(writer.rows, len(groups) * writer.group_rows)
    manifest = seal_manifest(key, rows, writer.d_model, groups, {}, moments, {})
    return Store(paths.staging, manifest, moments)


def remove_store(digest: str, stores: Path) -> None:
    """Remove a store, sealed or not: renamed out of the listing first, then deleted; never half a store.

    Raises: StoreLocked: a capture or a trainer holds it. StorageFailed.
    """
    paths = StorePaths(stores, digest)
    with durable.lock(paths.lock, f"a removal, pid {os.getpid()}"):
        durable.remove_tree(paths.trash)  # left by a removal that was interrupted
        for folder in (paths.sealed, paths.staging):
            if folder.is_dir():
                discard(folder, paths.trash)


def discard(folder: Path, trash: Path) -> None:
    """Delete the folder of a store or a run, its lock held: out of its place first, so that nobody opens or resumes half of it.

    Args:
        folder: what goes.
        trash: where it lies meanwhile, on the same disk; what an interrupted removal left there goes too.

    Raises: StorageFailed.
    """
    durable.remove_tree(trash)
    durable.make_dir(trash.parent)
    durable.rename_dir(folder, trash)
    durable.remove_tree(trash)
