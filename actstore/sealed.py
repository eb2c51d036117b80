"""What must hold of a sealed store's folder before any chunk is read: its manifest, and every small file as implied."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from actstore.digests import sha256_bytes
from actstore.errors import ActstoreError, FormatError, StoreDamaged, StoreNotSealed
from actstore.files import read_bounded
from actstore.key import StoreKey, Strict, dump_key, parse_key, parse_record
from actstore.layout import GROUP_METADATA, GROUPS, KEY, MANIFEST, PLAN, VOCABULARY, arrays_of, metadata_name, record_name
from actstore.limits import MAX_D_MODEL, MAX_KEY_BYTES, MAX_MANIFEST_BYTES, MAX_TABLE_BYTES, MAX_VOCABULARY_BYTES
from actstore.manifest import Manifest, RowGroup, Rows, group_digest, parse_manifest, parse_row_group, rows_per_group
from actstore.stats import Moments
from actstore.zarr_array import check_array_metadata, check_group_metadata, group_attributes


def read_manifest(path: Path) -> tuple[Manifest, Moments]:
    """Return the manifest in a store's folder, checked against the folder's name and the files it must name.

    Raises: StoreNotSealed: there is none. FormatError: damaged, of another version, or of another store.
    """
    try:
        data = read_bounded(path, MANIFEST, MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise StoreNotSealed(
            f"the store has no manifest: it was never sealed; {how_far(path)}",
            str(path),
            "run its capture again: it goes on where it stopped",
        ) from error
    return check_manifest(data, path.name, str(path), partial(_read_table, path))


def check_manifest(data: bytes, digest: str, where: str, read_table: Callable[[int], bytes]) -> tuple[Manifest, Moments]:
    """Return a manifest that is the one of this store, and names the files it must. Raises: FormatError."""
    what = where if where.endswith(MANIFEST) else f"{where}/{MANIFEST}"
    manifest, moments = parse_manifest(data, what, read_table)
    if digest != manifest.store:
        raise FormatError(f"the folder's name is not the digest of the store in it, {manifest.store}", where=where)
    expected = {KEY, VOCABULARY, GROUP_METADATA, *(metadata_name(a) for a in arrays_of(manifest.key.dtype))}
    expected |= {GROUPS} if manifest.format == 2 else set()
    if set(manifest.files) != expected:
        raise FormatError(f"the manifest must name exactly the files {', '.join(sorted(expected))}", where=where)
    return manifest, moments


def _read_table(path: Path, size: int) -> bytes:
    """Return the table of row groups in a store's folder, at most of this size. Raises: FormatError."""
    if size > MAX_TABLE_BYTES:
        raise FormatError(f"{GROUPS} must have {size} bytes, at most {MAX_TABLE_BYTES} are allowed", where=str(path))
    try:
        return read_bounded(path, GROUPS, size)
    except FileNotFoundError as error:
        raise FormatError(f"{GROUPS}, which lists the row groups, is missing", where=str(path)) from error


def check_record(data: bytes, group: int, manifest: Manifest) -> RowGroup:
    """Return the commit record in some bytes, which is the one that a manifest names. Raises: StoreDamaged."""
    name = record_name(group)
    try:
        record, _ = parse_row_group(data, name, manifest.d_model, manifest.key.dtype)
    except FormatError as error:
        raise StoreDamaged(f"record {name}: {error.what}") from error
    if group_digest(record) != manifest.groups[group]:
        raise StoreDamaged(f"record {name} is not the one the manifest names")
    return record


def record_names(folder: Path) -> set[str]:
    """Return the names of the commit records in a store's folder, below it.

    Example:
        >>> record_names(Path("nowhere"))
        set()
    """
    try:
        return {f"row_groups/{name}" for name in os.listdir(folder / "row_groups") if name.endswith(".json")}
    except OSError:
        return set()


def committed_groups(folder: Path) -> int:
    """Return the number of row groups committed in a store's folder.

    Example:
        >>> committed_groups(Path("nowhere"))
        0
    """
    return len(record_names(folder))


class Outline(Strict):
    """What `plan.json` says of an unsealed store: the size it is to have."""

    rows: Rows
    d_model: Annotated[int, Field(ge=1, le=MAX_D_MODEL)]


def read_outline(folder: Path) -> tuple[StoreKey, Outline]:
    """Return the key and the size of an unsealed store. Raises: FileNotFoundError, FormatError, StorageFailed."""
    key = parse_key(read_bounded(folder, KEY, MAX_KEY_BYTES))
    return key, parse_record(Outline, read_bounded(folder, PLAN, MAX_KEY_BYTES), PLAN)


def how_far(folder: Path) -> str:
    """Return how much of an unsealed store is there, such as "17 of 40 row groups are committed".

    Example:
        >>> how_far(Path("nowhere"))
        '0 row groups are committed'
    """
    committed = committed_groups(folder)
    try:
        key, outline = read_outline(folder)
    except (OSError, ActstoreError):  # just begun, or not ours
        return f"{committed} row groups are committed"
    total = -(-outline.rows // rows_per_group(outline.d_model, key.dtype, outline.rows))
    return f"{committed} of {total} row groups are committed"


def check_small_file(path: Path, name: str, manifest: Manifest, moments: Moments) -> None:
    """Refuse a small file of a store that has not the digest, or says anything but what the manifest implies.

    Raises: StoreDamaged: missing, or another digest. FormatError: not a regular file, or other contents than implied.
    """
    if name == GROUPS:
        return  # read and proven with the manifest
    try:
        data = read_bounded(path, name, small_file_limit(name))
    except FileNotFoundError as error:
        raise _damaged(f"file {name} is missing", str(path), manifest.store) from error
    check_small_bytes(name, data, manifest, moments, str(path))


def small_file_limit(name: str) -> int:
    """Return the bytes that a small file of a store may have.

    Example:
        >>> small_file_limit("acts/zarr.json") == MAX_KEY_BYTES
        True
    """
    return {VOCABULARY: MAX_VOCABULARY_BYTES, GROUPS: MAX_TABLE_BYTES}.get(name, MAX_KEY_BYTES)


def check_small_bytes(name: str, data: bytes, manifest: Manifest, moments: Moments, where: str) -> None:
    """Refuse the bytes of a small file; see `check_small_file`."""
    found, wanted = sha256_bytes(data), manifest.files[name]
    if found != wanted:
        raise _damaged(f"file {name} has digest {found[:12]}…, the manifest says {wanted[:12]}…", where, manifest.store)
    if name == KEY and data != dump_key(manifest.key):
        raise FormatError("key.json is not the key of the manifest", where=f"{where}/{name}")
    if name == GROUP_METADATA:
        check_group_metadata(data, group_attributes(manifest.key, manifest.content_digest, moments))
    elif name.endswith(GROUP_METADATA):
        array, key = name.removesuffix("/" + GROUP_METADATA), manifest.key
        check_array_metadata(array, data, manifest.rows, manifest.d_model, key.dtype, manifest.group_rows)


def small_file_problems(path: Path, manifest: Manifest, moments: Moments) -> dict[str, str]:
    """Return the damaged small files of a store by name, and of each one sentence that says what is wrong."""
    problems = {}
    for name in sorted(manifest.files):
        try:
            check_small_file(path, name, manifest, moments)
        except ActstoreError as error:
            problems[name] = error.what if name in error.what else f"{name}: {error.what}"
    return problems


def _damaged(what: str, where: str, digest: str) -> StoreDamaged:
    return StoreDamaged(what, where, f"`actstore verify {digest[:12]} --data` lists all damage")
