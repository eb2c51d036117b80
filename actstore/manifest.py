"""The two records of a store: one row group's commit, and the manifest that seals all of them.

Both end in a digest of themselves, so a flip of any bit shows. The manifest names each row group by one digest, that
of its identity (range of rows, digests of its chunks); a reader checks a record against it when it first touches the
group, so opening a store reads one small file whatever its size.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError
from actstore.key import Digest, Record, StoredDtype, StoreKey, Strict, parse_record, store_digest
from actstore.layout import arrays_of
from actstore.limits import MAX_CHUNK_BYTES, MAX_D_MODEL, MAX_ROWS, MIN_GROUP_ROWS
from actstore.stats import Moments, dump_moments, parse_moments

# of one coordinate while a row group is gathered: int8 is made from float32 rows
ITEM_BYTES: dict[StoredDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 4}
Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]


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


class Manifest(Strict):
    """The seal of a store. `group_rows` is the number of rows in each row group but the last."""

    format: Literal[1] = 1
    store: Digest
    key: StoreKey
    rows: Rows
    d_model: Annotated[int, Field(ge=1, le=MAX_D_MODEL)]
    group_rows: Annotated[int, Field(ge=MIN_GROUP_ROWS, le=MAX_ROWS)]
    groups: list[Digest] = Field(min_length=1, fail_fast=True)  # a million findings would take gigabytes
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


def content_digest(key: StoreKey, rows: int, groups: list[str]) -> str:
    """Return the content digest: a Merkle root over the key, the row count and every chunk digest.

    Args:
        key: the store key.
        rows: rows in the store.
        groups: `group_digest` of each row group, in order.
    """
    return sha256_bytes(canonical_json({"key": store_digest(key), "rows": rows, "groups": groups}))


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


def parse_manifest(data: bytes, what: str = "manifest.json") -> tuple[Manifest, Moments]:
    """Parse and cross-check a manifest.

    Raises: FormatError: damaged, or its parts disagree (digest of the key, number of groups, content digest).
    """
    manifest = _parse_sealed(Manifest, data, what)
    expected = {
        "store": store_digest(manifest.key),
        "group_rows": rows_per_group(manifest.d_model, manifest.key.dtype, manifest.rows),
        "content_digest": content_digest(manifest.key, manifest.rows, manifest.groups),
    }
    for field, value in expected.items():
        if getattr(manifest, field) != value:
            raise FormatError(f"{what}: field {field} is {getattr(manifest, field)}, its key and rows imply {value}", where=what)
    if len(manifest.groups) != -(-manifest.rows // manifest.group_rows):
        raise FormatError(f"{what}: {len(manifest.groups)} row groups cannot hold {manifest.rows} rows", where=what)
    return manifest, parse_moments(manifest.statistics, manifest.d_model, what)


def seal_manifest(
    key: StoreKey, rows: int, d_model: int, groups: list[str], files: dict[str, str], moments: Moments, provenance: dict[str, Any]
) -> Manifest:
    """Return the manifest of a complete store.

    Args:
        key: the store key.
        rows: rows in the store.
        d_model: width of a row.
        groups: `group_digest` of each row group, in order.
        files: SHA-256 of each other file of the store, by name.
        moments: of all rows, merged in group order.
        provenance: versions, device, threads, seconds; read by people only.
    """
    return Manifest(
        store=store_digest(key),
        key=key,
        rows=rows,
        d_model=d_model,
        group_rows=rows_per_group(d_model, key.dtype, rows),
        groups=groups,
        files=files,
        statistics=dump_moments(moments),
        content_digest=content_digest(key, rows, groups),
        provenance=provenance,
    )
