"""Row groups shared between stores that differ only in how many rows were asked for: linked, not computed again.

Row group i is a pure function of (key without `rows`, i) as long as it is full, so a store can take it from a shorter
or a longer one, finished or not. Every byte is verified against the other's records before it gets its second name.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from actstore import durable
from actstore.catalog import digests_in, open_partial
from actstore.check import group_findings
from actstore.errors import ActstoreError, StoreDamaged
from actstore.files import read_bounded
from actstore.key import StoreKey, parse_key
from actstore.layout import KEY, StorePaths, chunk_name, record_name
from actstore.limits import MAX_KEY_BYTES
from actstore.reader import Store, open_unchecked
from actstore.sealed import read_outline
from actstore.stats import parse_moments
from actstore.writer import READ_ONLY, StoreWriter
from actstore.zarr_array import chunk_bytes


def sources_for(key: StoreKey, digest: str, stores: Path) -> list[Store]:
    """Return the stores of a folder whose key differs from `key` in nothing but the rows asked for, unsealed ones last.

    Args:
        key: of the store to be filled.
        digest: its store digest, which is left out.
        stores: folder of stores.

    Stores that cannot be read are passed over: what they hold is computed instead.
    """
    found = []
    for other in digests_in(stores):
        folder = StorePaths(stores, other).sealed
        with contextlib.suppress(ActstoreError, OSError):
            if other != digest and parse_key(read_bounded(folder, KEY, MAX_KEY_BYTES)).same_but_rows(key):
                store = open_unchecked(folder)
                found += [store] if store.key.same_but_rows(key) else []  # key.json alone proves nothing
    for other in digests_in(stores / ".staging"):
        with contextlib.suppress(ActstoreError, OSError):
            if other != digest and read_outline(StorePaths(stores, other).staging)[0].same_but_rows(key):
                found.append(open_partial(other, stores))
    return found


def linkable(writer: StoreWriter, source: Store, index: int) -> bool:
    """Return whether row group `index` is full in both stores, and cut alike."""
    end = (index + 1) * writer.group_rows
    return source.manifest.group_rows == writer.group_rows and end <= min(writer.rows, source.rows)


def link_group(writer: StoreWriter, source: Store, index: int) -> None:
    """Commit a claimed row group by linking the chunk files of another store.

    Raises: StoreDamaged, FormatError: the other store's row group is not what its manifest says; nothing was committed.
        DiskFull, StorageFailed.
    """
    findings = group_findings(source, index, data=True)
    if findings:
        raise StoreDamaged(findings[0], f"store {source.digest[:12]}", f"`actstore repair {source.digest[:12]}` mends it")
    limit = chunk_bytes("acts", writer.group_rows, writer.d_model, "float32")  # no array of the row group is larger
    record = source.record(index)
    moments = parse_moments(record.statistics, source.d_model, record_name(index))
    for array in writer.arrays:
        chunk = chunk_name(array, index)
        if not durable.link(source.path / chunk, writer.paths.staging, chunk):
            durable.write_new(writer.paths.staging, chunk, [read_bounded(source.path, chunk, limit)], mode=READ_ONLY)
    writer.commit(index, {array: record.chunks[array] for array in record.chunks}, moments)
