"""The two records of a store: one row group's commit, and the manifest that seals all of them.

Both end in a digest of themselves, so a flip of any bit shows. The manifest names each row group by one digest, that
of its identity (range of rows, digests of its chunks); a reader checks a record against it when it first touches the
group, so opening a store reads one small file whatever its size. Of a store with more than MAX_LISTED_GROUPS row
groups the manifest is of format version 2: their digests lie in a file of their own, 32 bytes each, and are never made
into Python objects. The content digest is the same function of them in both versions, and proves them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, InstanceOf

from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError
from actstore.key import Digest, Record, StoredDtype, StoreKey, Strict, parse_record, store_digest
from actstore.layout import GROUPS, arrays_of
from actstore.limits import MAX_CHUNK_BYTES, MAX_D_MODEL, MAX_LISTED_GROUPS, MAX_ROWS, MIN_GROUP_ROWS
from actstore.stats import Moments, dump_moments, parse_moments

# of one coordinate while a row group is gathered: int8 is made from float32 rows
ITEM_BYTES: dict[StoredDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 4}
Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]
DIGEST_BYTES = 32  # of a SHA-256
GROUPS_AT_ONCE = 4096  # spelled in one piece, for a processor's cache


class Chunk(Strict):
    """The digests of one chunk file: SHA-256 of all its bytes, crc32c of its rows (the file's last four bytes)."""

    sha256: Digest
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]


class RowGroup(Strict):
    """A committed row group.

    `store`, `index`, `rows` and `chunks` are its identity; `statistics` ride along, outside the content digest,
    because their last bits depend on the CPU that summed them.
    """

    format: Literal[1] = 1
    store: Digest
    index: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    rows: Rows
    chunks: dict[Literal["acts", "tokens", "documents", "positions", "scale", "columns", "exact"], Chunk]
    statistics: dict[str, Any]
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests of many row groups, in order, in one piece of memory: a million of them take 32 MB, not 120.

    Args:
        table: DIGEST_BYTES for each.

    Example:
        >>> digests = Digests.of(["ab" * 32, "cd" * 32])
        >>> len(digests), digests[1][:4]
        (2, 'cdcd')
    """

    table: bytes

    @classmethod
    def of(cls, groups: Sequence[str] | Digests) -> Digests:
        """Return hexadecimal digests as a table."""
        return groups if isinstance(groups, Digests) else cls(bytes.fromhex("".join(groups)))

    def __len__(self) -> int:
        """Return the number of digests."""
        return len(self.table) // DIGEST_BYTES

    def __getitem__(self, index: int) -> str:
        """Return one digest, 64 hexadecimal digits."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.table[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES].hex()


class Manifest(Strict):
    """The seal of a store. `group_rows` is the number of rows in each row group but the last.

    `groups` are the digests of the row groups: a list in the manifest itself (format 1), or a table beside it (2).
    """

    format: Literal[1, 2] = 1
    store: Digest
    key: StoreKey
    rows: Rows
    d_model: Annotated[int, Field(ge=1, le=MAX_D_MODEL)]
    group_rows: Annotated[int, Field(ge=MIN_GROUP_ROWS, le=MAX_ROWS)]
    groups: Annotated[list[Digest], Field(min_length=1, fail_fast=True)] | InstanceOf[Digests] = Field(
        default=Digests(b""), exclude_if=lambda groups: isinstance(groups, Digests)
    )  # fail_fast: a million findings would take gigabytes
    files: dict[str, Digest]
    statistics: dict[str, Any]
    content_digest: Digest
    provenance: dict[str, Any]
    digest: Digest | None = None


def rows_per_group(d_model: int, dtype: StoredDtype, rows: int) -> int:
    """Return the rows of a row group: the largest power of two that takes at most MAX_CHUNK_BYTES.

    A store smaller than that has one group, of the next power of two of its rows, so that the padding of the last
    chunk never costs more than the rows themselves. At least MIN_GROUP_ROWS.

    Example:
        >>> rows_per_group(1024, "float32", 10**6), rows_per_group(64, "float16", 5000)
        (8192, 8192)
    """
    largest = 1 << ((MAX_CHUNK_BYTES // (d_model * ITEM_BYTES[dtype])) or 1).bit_length() - 1
    return max(MIN_GROUP_ROWS, min(largest, 1 << (rows - 1).bit_length()))


def group_digest(group: RowGroup) -> str:
    """Return the digest of a row group's identity: where it lies and which bytes it has."""
    return sha256_bytes(canonical_json(group.model_dump(include={"store", "index", "rows", "chunks"})))


def content_digest(key: StoreKey, rows: int, groups: Sequence[str] | Digests) -> str:
    """Return the content digest: a Merkle root over the key, the row count and every chunk digest.

    It is the SHA-256 of `canonical_json({"groups": […], "key": …, "rows": …})`, spelled piece by piece.

    Args:
        key: the store key.
        rows: rows in the store.
        groups: `group_digest` of each row group, in order.
    """
    table, pieces = memoryview(Digests.of(groups).table), hashlib.sha256(b'{"groups":[')
    for at in range(0, len(table), GROUPS_AT_ONCE * DIGEST_BYTES):
        piece = table[at : at + GROUPS_AT_ONCE * DIGEST_BYTES].hex(",", DIGEST_BYTES).replace(",", '","')
        pieces.update(f'{"," if at else ""}"{piece}"'.encode())
    pieces.update(b"]," + canonical_json({"key": store_digest(key), "rows": rows})[1:])
    return pieces.hexdigest()


def dump_record(record: RowGroup | Manifest) -> bytes:
    """Return the record as canonical JSON with a digest of everything else in its field `digest`."""
    body = record.model_dump(exclude={"digest"})
    return canonical_json({**body, "digest": sha256_bytes(canonical_json(body))})


def _parse_sealed(kind: type[Record], data: bytes, what: str) -> Record:
    record = parse_record(kind, data, what)
    whole = record.model_dump()
    body = {name: value for name, value in whole.items() if name != "digest"}
    if whole["digest"] != sha256_bytes(canonical_json(body)) or canonical_json(whole) != data:
        raise FormatError(f"{what} is damaged: it does not match the digest it ends in", where=what)
    return record


def parse_row_group(data: bytes, what: str, d_model: int, dtype: str) -> tuple[RowGroup, Moments]:
    """Parse a commit record. Raises: FormatError: damaged, or chunks other than those of the stored dtype's arrays."""
    group = _parse_sealed(RowGroup, data, what)
    if set(group.chunks) != set(arrays_of(dtype)):
        raise FormatError(f"{what}: field chunks: expected {', '.join(arrays_of(dtype))}", where=what)
    return group, parse_moments(group.statistics, d_model, what)


def _no_table(size: int) -> NoReturn:
    raise FormatError(f"its row groups are listed in {GROUPS}, {size} bytes, which is not here")


def parse_manifest(
    data: bytes, what: str = "manifest.json", read_table: Callable[[int], bytes] = _no_table
) -> tuple[Manifest, Moments]:
    """Parse and cross-check a manifest.

    Args:
        data: the file's bytes.
        what: its name, for messages.
        read_table: given the size in bytes that the table of row groups must have, returns it; for format 2 only.

    Raises: FormatError: damaged, or its parts disagree (digest of the key, number of groups, content digest).
    """
    manifest = _parse_sealed(Manifest, data, what)

    def expect(field: str, value: int | str) -> None:
        if getattr(manifest, field) != value:
            raise FormatError(f"{what}: field {field} is {getattr(manifest, field)}, its key and rows imply {value}", where=what)

    expect("store", store_digest(manifest.key))
    expect("group_rows", rows_per_group(manifest.d_model, manifest.key.dtype, manifest.rows))
    n_groups, tabled = -(-manifest.rows // manifest.group_rows), isinstance(manifest.groups, Digests)
    if tabled != (manifest.format == 2):
        raise FormatError(f"{what}: format 1 lists its row groups, format 2 keeps them in {GROUPS}", where=what)
    if tabled:
        table = read_table(n_groups * DIGEST_BYTES)
        if manifest.files.get(GROUPS) != sha256_bytes(table):
            raise FormatError(f"{what}: {GROUPS} is not the one it names", where=what)
        manifest = manifest.model_copy(update={"groups": Digests(table)})
    if len(manifest.groups) != n_groups:
        raise FormatError(f"{what}: {len(manifest.groups)} row groups cannot hold {manifest.rows} rows", where=what)
    expect("content_digest", content_digest(manifest.key, manifest.rows, manifest.groups))
    return manifest, parse_moments(manifest.statistics, manifest.d_model, what)


def seal_manifest(
    key: StoreKey, rows: int, d_model: int, groups: list[str], files: dict[str, str], moments: Moments, provenance: dict[str, Any]
) -> Manifest:
    """Return the manifest of a complete store, of format 2 when it has more than MAX_LISTED_GROUPS row groups.

    Args:
        key: the store key.
        rows: rows in the store.
        d_model: width of a row.
        groups: `group_digest` of each row group, in order.
        files: SHA-256 of each other file of the store, by name.
        moments: of all rows, merged in group order.
        provenance: versions, device, threads, seconds; read by people only.
    """
    tabled = len(groups) > MAX_LISTED_GROUPS
    return Manifest(
        format=2 if tabled else 1,
        store=store_digest(key),
        key=key,
        rows=rows,
        d_model=d_model,
        group_rows=rows_per_group(d_model, key.dtype, rows),
        groups=Digests.of(groups) if tabled else groups,
        files=files,
        statistics=dump_moments(moments),
        content_digest=content_digest(key, rows, groups),
        provenance=provenance,
    )
