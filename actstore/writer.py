"""Row groups into an unsealed store, an unsealed store into a sealed one: the commit protocol (reliability.md, section 3).

Order of writing: key.json; for each row group its four chunks, then its record (the commit point); at the end
vocabulary.json and the zarr.json files, then manifest.json, then one rename from .staging/ to its place (the seal
point). Every file goes through `durable.write_new`. A row group is a pure function of (key, index), so resuming is
writing the missing ones.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore import durable
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError, NonFiniteActivation, StoreLocked
from actstore.key import StoreKey, dump_key, store_digest
from actstore.layout import ARRAYS, GROUP_METADATA, KEY, MANIFEST, VOCABULARY, StorePaths, chunk_name, metadata_name, record_name
from actstore.limits import MAX_RECORD_BYTES
from actstore.manifest import (
    Manifest,
    RowGroup,
    dump_record,
    group_digest,
    parse_row_group,
    rows_per_group,
    seal_manifest,
)  # fmt: skip
from actstore.stats import Moments, dump_moments, merge, moments_of, no_rows
from actstore.zarr_array import array_metadata, chunk_bytes, encode_chunk, numpy_dtype

Array = npt.NDArray[Any]
READ_ONLY = 0o444


@dataclass(slots=True)
class StoreWriter:
    """An unsealed store, open for writing by this process alone. Make one with `open_writer`.

    Args:
        paths: where the store lies.
        key: what it is derived from.
        rows: rows it will have.
        d_model: width of a row.
        committed: the row groups on disk, by index.
    """

    paths: StorePaths
    key: StoreKey
    rows: int
    d_model: int
    committed: dict[int, tuple[RowGroup, Moments]] = field(default_factory=dict)

    @property
    def group_rows(self) -> int:
        """Rows of every row group but the last."""
        return rows_per_group(self.d_model, self.key.dtype, self.rows)

    @property
    def n_groups(self) -> int:
        """Row groups the sealed store will have."""
        return -(-self.rows // self.group_rows)

    def span(self, group: int) -> tuple[int, int]:
        """Return the rows [start, stop) of a row group."""
        return group * self.group_rows, min(self.rows, (group + 1) * self.group_rows)

    def missing_row_groups(self) -> list[int]:
        """Return the indices of the row groups not committed yet."""
        return [i for i in range(self.n_groups) if i not in self.committed]

    @property
    def missing_bytes(self) -> int:
        """Bytes that the missing row groups will take on disk."""
        each = sum(chunk_bytes(a, self.group_rows, self.d_model, self.key.dtype) for a in ARRAYS)
        return len(self.missing_row_groups()) * (each + 64 * self.d_model + 4096)  # and a record


def to_stored(acts: Array, dtype: str, hook: str, first_row: int) -> Array:
    """Return activations in the stored dtype; nothing that is not a finite number gets through.

    Args:
        acts: (rows, d_model) float array.
        dtype: the stored dtype's name.
        hook: hook point, for the message.
        first_row: row of the store where `acts` begins, for the message.

    Raises: NonFiniteActivation: NaN or Inf, or a value beyond the stored dtype's range.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(acts.astype(numpy_dtype("acts", dtype), copy=False))
        finite = np.isfinite(stored)
    if finite.all():
        return stored
    row, column = (int(i) for i in np.argwhere(~finite)[0])
    value = float(acts[row, column])
    where = f"hook point {hook}, row {first_row + row}, dimension {column}; {int((~finite).sum())} values of this batch"
    if np.isfinite(value):
        raise NonFiniteActivation(
            f"the activation {value:g} is beyond the range of {dtype}", where, "use --dtype float32 or bfloat16"
        )
    raise NonFiniteActivation(
        f"the model gave {value}",
        where,
        "try --compute-dtype float32; a text that breaks the model can be left out of the corpus",
    )


@contextlib.contextmanager
def writing(paths: StorePaths) -> Iterator[None]:
    """Hold a store's exclusive lock: one writer, and the second is refused at once.

    Raises: StoreLocked: another process writes, reads or just sealed it. StorageFailed.
    """
    with durable.lock(paths.lock, f"a capture, pid {os.getpid()} on {socket.gethostname()}"):
        if paths.sealed.is_dir():
            raise StoreLocked(
                "another process sealed this store just now", str(paths.sealed), "run the command again: it is free"
            )
        yield


def open_writer(paths: StorePaths, key: StoreKey, rows: int, d_model: int) -> StoreWriter:
    """Open the unsealed store of a key, its lock held by `writing`: sweep temporary files, find what is committed.

    Raises: StorageFailed, DiskFull.
    """
    durable.make_dir(paths.staging)
    durable.remove_tree(paths.staging / "tmp")
    for folder in (*ARRAYS, "row_groups"):
        durable.make_dir(paths.staging / folder)
    if not (paths.staging / KEY).exists():
        durable.write_new(paths.staging, KEY, [dump_key(key)], mode=READ_ONLY)
    writer = StoreWriter(paths, key, rows, d_model)
    for index in range(writer.n_groups):
        found = _committed(writer, index)
        if found is not None:
            writer.committed[index] = found
        else:
            _drop(writer, index)
    return writer


def _committed(writer: StoreWriter, index: int) -> tuple[RowGroup, Moments] | None:
    """Return a committed row group whose record is intact and whose chunks have their size, or None."""
    start, stop = writer.span(index)
    try:
        data = durable.read_bounded(writer.paths.staging / record_name(index), MAX_RECORD_BYTES)
        group, moments = parse_row_group(data, record_name(index), writer.d_model)
        for array in ARRAYS:
            size = (writer.paths.staging / chunk_name(array, index)).stat().st_size
            if size != chunk_bytes(array, writer.group_rows, writer.d_model, writer.key.dtype):
                return None
    except (FileNotFoundError, FormatError):
        return None
    same = (group.store, group.index, group.rows) == (store_digest(writer.key), index, stop - start)
    return (group, moments) if same else None


def _drop(writer: StoreWriter, index: int) -> None:
    """Delete the remains of a row group that was not committed, record first."""
    for name in (record_name(index), *(chunk_name(array, index) for array in ARRAYS)):
        if (writer.paths.staging / name).exists():
            durable.remove_file(writer.paths.staging / name)


def put_rows(writer: StoreWriter, index: int, acts: Array, tokens: Array, documents: Array, positions: Array) -> None:
    """Commit one row group: when this returns, neither a kill nor a power loss can take it.

    Args:
        writer: the open store.
        index: which row group.
        acts: (rows, d_model) in the stored dtype, from `to_stored`.
        tokens, documents, positions: (rows,) int32.

    Raises: DiskFull, StorageFailed: the row group is not committed; those before it are.
    """
    start, stop = writer.span(index)
    arrays = dict(zip(ARRAYS, (acts, tokens, documents, positions), strict=True))
    chunks = {}
    for array, rows in arrays.items():
        assert len(rows) == stop - start and rows.dtype == numpy_dtype(array, writer.key.dtype), array
        buffers, chunks[array] = encode_chunk(rows, writer.group_rows)
        durable.write_new(writer.paths.staging, chunk_name(array, index), buffers, mode=READ_ONLY)
    moments = moments_of(acts)
    group = RowGroup.model_validate(
        {
            "store": writer.paths.digest,
            "index": index,
            "rows": stop - start,
            "chunks": chunks,
            "statistics": dump_moments(moments),
        }
    )
    durable.write_new(writer.paths.staging, record_name(index), [dump_record(group)], mode=READ_ONLY)
    writer.committed[index] = (group, moments)


def seal(writer: StoreWriter, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> Manifest:
    """Seal a complete store and publish it under its digest. From here on nothing in the folder changes.

    Args:
        writer: the open store, no row group missing.
        vocabulary: {"tokens": text of each id, "special": ids}.
        provenance: versions, device, threads, seconds.

    Raises: DiskFull, StorageFailed: the store stays unsealed; the same command seals it.
    """
    assert not writer.missing_row_groups()
    groups = [writer.committed[i] for i in range(writer.n_groups)]
    moments = no_rows(writer.d_model)
    for _, of_group in groups:
        moments = merge(moments, of_group)
    manifest = seal_manifest(
        writer.key, writer.rows, writer.d_model, [group_digest(g) for g, _ in groups], {}, moments, provenance
    )
    attributes = {
        "actstore": {
            "key": writer.key.model_dump(),
            "content_digest": manifest.content_digest,
            "mean_norm": moments.mean_norm,
            "total_variance": moments.total_variance,
        }
    }
    files = {KEY: dump_key(writer.key), VOCABULARY: canonical_json(vocabulary)}
    files |= array_metadata(writer.rows, writer.d_model, writer.key.dtype, writer.group_rows, attributes)
    manifest = manifest.model_copy(update={"files": {name: sha256_bytes(data) for name, data in files.items()}})
    staging = writer.paths.staging
    for name in (VOCABULARY, *(metadata_name(a) for a in ARRAYS), GROUP_METADATA):
        durable.remove_file(staging / name)  # of a seal that was interrupted, perhaps by another version of zarr
        durable.write_new(staging, name, [files[name]], mode=READ_ONLY)
    durable.remove_file(staging / MANIFEST)
    durable.write_new(staging, MANIFEST, [dump_record(manifest)], mode=READ_ONLY)
    durable.remove_tree(staging / "tmp")
    durable.sync_folder(staging)  # else a power loss may keep the rename and bring temporary files back into a sealed store
    durable.rename_dir(staging, writer.paths.sealed)
    return manifest
