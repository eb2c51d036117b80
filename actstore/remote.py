"""Stores to and from a bucket: only what is missing moves, every byte is verified on arrival, nothing half-done is a store.

A bucket holds the files of a store under the names they have on disk, below `<prefix>/<store digest>/`. A row group's
record goes up after its chunks and the manifest last, created and never overwritten, so a reader of the bucket sees a
store when it is whole. What comes down goes through a capture's own writer: claimed row groups in `stores/.staging`, one
rename at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.arrivals import find_remote, remote_chunk, remote_manifest, remote_record, remote_small_file
from actstore.bucket import Bucket, list_objects, write_object
from actstore.catalog import reading
from actstore.digests import sha256_bytes
from actstore.errors import DiskFull, FormatError, KeyMismatch, StorageFailed, StoreDamaged
from actstore.files import read_bounded
from actstore.layout import MANIFEST, StorePaths, arrays_of, chunk_name, record_name
from actstore.limits import MAX_MANIFEST_BYTES, MAX_RECORD_BYTES, MIB, MIN_FREE_BYTES
from actstore.link import link_group, linkable, sources_for
from actstore.manifest import Manifest
from actstore.reader import Store
from actstore.seal import publish
from actstore.sealed import read_manifest, small_file_limit
from actstore.stats import parse_moments
from actstore.writer import READ_ONLY, StoreWriter, open_writer, writing
from actstore.zarr_array import chunk_bytes

WORKERS = 8  # row groups at once; fewer where that many do not fit into IN_HAND_BYTES
IN_HAND_BYTES = 512 * MIB
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Transfer:
    """What a push or a pull did.

    Args:
        digest: the store digest.
        content_digest: of the store, here and there.
        row_groups: of the store.
        moved_row_groups: those of which something had to move.
        moved_bytes: of chunks and records.
        linked_row_groups: those taken from another store on this disk.
        repeated: whether there was nothing to do.
    """

    digest: str
    content_digest: str
    row_groups: int
    moved_row_groups: int = 0
    moved_bytes: int = 0
    linked_row_groups: int = 0
    repeated: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def _in_parallel(done: Transfer, groups: list[int], work: Callable[[int], int], each: int, progress: Progress) -> None:
    """Do the work of all row groups in threads, and add up the bytes moved; after an error nothing more is begun."""
    pool = ThreadPoolExecutor(max(1, min(WORKERS, IN_HAND_BYTES // each)), "actstore-move")
    try:
        for future in as_completed([pool.submit(work, group) for group in groups]):
            done.moved_bytes += future.result()
            done.moved_row_groups += future.result() > 0
            progress(each, each * len(groups))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _group_bytes(store: Store) -> int:
    manifest = store.manifest
    return sum(chunk_bytes(a, manifest.group_rows, store.d_model, store.dtype) for a in arrays_of(store.dtype))


def _other_content(manifest: Manifest, where: str, do: str) -> KeyMismatch:
    digest, content = manifest.store[:12], manifest.content_digest[:12]
    return KeyMismatch(
        f"store {digest} is there already with other content, {content}…: the same capture, rounded otherwise", where, do
    )


def _verified(store: Store, chunk: str, size: int, sha256: str) -> bytes:
    """Return a chunk's file. Raises: StoreDamaged: not what its record says."""
    data = read_bounded(store.path, chunk, size)
    if sha256_bytes(data) != sha256:
        do = f"`actstore repair {store.digest[:12]}` mends it"
        raise StoreDamaged(f"chunk {chunk} is not what its record says", str(store.path), do)
    return data


def push(store: Store, bucket: Bucket, progress: Progress = lambda done, total: None) -> Transfer:
    """Copy a sealed store into a bucket; what is there already does not move. Interrupted, the same call goes on.

    Args:
        store: the open store; every chunk is verified by its SHA-256 before it goes.
        bucket: where to.
        progress: called with (bytes done with since the last call, bytes in all).

    Raises: StoreDamaged: here, or a record there. KeyMismatch: there with other content. StorageFailed, StoreNotFound,
        FormatError.
    """
    there, sealed = dict(list_objects(bucket, store.digest)), False
    do = f"delete {bucket.url}/{store.digest}/ there, or push to another prefix"
    if MANIFEST in there:
        theirs, _, _ = remote_manifest(bucket, store.digest)
        if theirs.content_digest != store.content_digest:
            raise _other_content(theirs, bucket.url, do)
        sealed = True

    def put(name: str, data: bytes, create: bool = False) -> None:
        write_object(bucket, f"{store.digest}/{name}", data, create)

    def push_group(group: int) -> int:
        record, name = store.record(group), record_name(group)
        if name in there and not sealed:
            remote_record(bucket, store, group)  # else these could be the chunks of another capture
        moved = 0
        for array in arrays_of(store.dtype):
            chunk = chunk_name(array, group)
            size = os.lstat(store.path / chunk).st_size
            if name in there and there.get(chunk) == size:
                continue
            data = _verified(store, chunk, size, record.chunks[array].sha256)  # type: ignore[index]
            put(chunk, data)
            moved += size
        if name not in there:
            data = read_bounded(store.path, name, MAX_RECORD_BYTES)
            try:
                put(name, data, create=True)
            except FileExistsError:  # another push is at work: of the same store, or this raises
                remote_record(bucket, store, group)
            moved += len(data)
        return moved

    done = Transfer(store.digest, store.content_digest, len(store.manifest.groups))
    with reading(store):
        _in_parallel(done, list(range(done.row_groups)), push_group, _group_bytes(store), progress)
    for name in sorted(store.manifest.files):
        if not (sealed and name in there):
            put(name, read_bounded(store.path, name, small_file_limit(name)))
    if not sealed:
        try:
            put(MANIFEST, read_bounded(store.path, MANIFEST, MAX_MANIFEST_BYTES), create=True)
        except FileExistsError:  # another push sealed it just now
            theirs, _, _ = remote_manifest(bucket, store.digest)
            if theirs.content_digest != store.content_digest:
                raise _other_content(theirs, bucket.url, do) from None
    done.repeated = sealed and not done.moved_bytes
    return done


def pull(bucket: Bucket, prefix: str, stores: Path, progress: Progress = lambda done, total: None) -> Transfer:
    """Copy a sealed store out of a bucket, verified on arrival, and seal it here. Interrupted, the same call goes on.

    Row groups that this folder has, in a half-done pull or capture of the store or in one that differs only in its
    number of rows, do not move.

    Args:
        bucket: where from.
        prefix: the store's digest, or a unique prefix of it.
        stores: folder of stores.
        progress: called with (bytes done with since the last call, bytes in all).

    Raises: StoreNotFound, StoreNotSealed, UsageError; StoreDamaged, FormatError: what arrived is not what its manifest
        says; KeyMismatch: the store is here with other content; StoreLocked, DiskFull, StorageFailed.
    """
    manifest, moments, data = remote_manifest(bucket, find_remote(bucket, prefix))
    paths = StorePaths(stores, manifest.store)
    done = Transfer(manifest.store, manifest.content_digest, len(manifest.groups))
    if paths.sealed.is_dir():
        mine, _ = read_manifest(paths.sealed)
        if mine.content_digest != manifest.content_digest:
            raise _other_content(mine, str(paths.sealed), "keep ours, or pull into another folder with --stores")
        done.repeated = True
        return done
    with writing(paths):
        writer = open_writer(paths, manifest.key, manifest.rows, manifest.d_model)
        for index, digest in list(writer.committed.items()):
            if digest != manifest.groups[index]:  # of a capture that rounded otherwise
                durable.remove_file(paths.staging / record_name(index))
                del writer.committed[index]
        missing, each = writer.missing_row_groups(), writer.group_bytes
        free = durable.free_bytes(paths.staging)
        if each * len(missing) + MIN_FREE_BYTES > free:
            needed = each * len(missing) / 1e9
            raise DiskFull(
                f"the store needs {needed:.2f} GB (and {MIN_FREE_BYTES / 1e9:.2f} GB to spare), {free / 1e9:.2f} GB are free",
                str(stores), "make space; what is there already is kept",
            )  # fmt: skip
        store, sources = Store(paths.staging, manifest, moments), sources_for(manifest.key, manifest.store, stores)
        work = lambda group: _pull_group(bucket, store, writer, sources, group, done)  # noqa: E731
        _in_parallel(done, missing, work, each, progress)
        publish(writer, {name: remote_small_file(bucket, name, manifest, moments) for name in sorted(manifest.files)}, data)
        with contextlib.suppress(StorageFailed):
            durable.remove_tree(paths.claims)
    return done


def _pull_group(bucket: Bucket, store: Store, writer: StoreWriter, sources: list[Store], group: int, done: Transfer) -> int:
    """Commit one row group, linked from another store or fetched; return the bytes fetched."""
    claim = writer.try_claim(group)
    assert claim is not None, "the store's lock is ours"
    with claim:
        record, raw = remote_record(bucket, store, group)
        for source in sources:
            with contextlib.suppress(StoreDamaged, FormatError):  # damaged there: it is fetched instead
                if linkable(writer, source, group) and source.record(group).chunks == record.chunks:
                    link_group(writer, source, group)
                    done.linked_row_groups += 1
                    return 0
        moved = len(raw)
        for array in writer.arrays:
            data = remote_chunk(bucket, store, record, array)
            durable.write_new(store.path, chunk_name(array, group), [data], mode=READ_ONLY)
            moved += len(data)
        chunks = {str(array): chunk for array, chunk in record.chunks.items()}
        writer.commit(group, chunks, parse_moments(record.statistics, store.d_model, record_name(group)))
    return moved
