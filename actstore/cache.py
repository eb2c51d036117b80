"""Stores in a bucket, read through a bounded folder on disk: chunks come when they are wanted, and go when room is needed.

A store's folder here is like any other, `<cache>/<content digest>/<store digest>/`, but without a manifest: it is never
taken for a whole one. Every file is verified before it gets its name (chunks by SHA-256), and again by the reader when it
is mapped. Room is made by deleting the chunks used longest ago, never those of the last two calls of `want`: the window
being read and the next one. A deleted file that is still mapped stays readable until the map goes, and one that another
process deletes is fetched again, so processes share a cache without asking each other; the bound is each one's own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from actstore import durable
from actstore.arrivals import find_remote, remote_chunk, remote_manifest, remote_record, remote_small_file
from actstore.bucket import Bucket, open_bucket
from actstore.errors import ActstoreError, StoreLocked, UsageError
from actstore.layout import StorePaths, arrays_of, chunk_name, record_name
from actstore.reader import Store
from actstore.sealed import check_small_file
from actstore.writer import READ_ONLY
from actstore.zarr_array import chunk_bytes

FETCHERS = 8  # requests at once
CACHE_BYTES = 50 * 10**9
Name = tuple[str, int]  # of a file below a store's folder: array or "row_groups", and row group


def cache_folder(folder: Path | str | None = None) -> Path:
    """Return the folder of the cache: the argument, else $ACTSTORE_CACHE, else actstore/ in the user's cache folder.

    Example:
        >>> cache_folder("elsewhere").name
        'elsewhere'
    """
    return Path(
        folder or os.environ.get("ACTSTORE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "actstore")
    )


class Cache:
    """A bounded folder through which stores in buckets are read. Use it in a `with`, or close it.

    Args:
        folder: see `cache_folder`.
        limit_bytes: of all files in it.

    Example:
        >>> with Cache() as cache:                                        # doctest: +SKIP
        ...     store = cache.open("s3://bucket/prefix#3fa9")
        ...     trainer.fit(store, trainer.FitConfig(shuffle="chunks"))
    """

    def __init__(self, folder: Path | str | None = None, limit_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.limit_bytes = cache_folder(folder).absolute(), limit_bytes
        self._stores: dict[Path, tuple[Store, Bucket]] = {}
        self._wanted: dict[tuple[Path, str], deque[dict[Path, int]]] = {}  # bytes of each file of the last two calls
        self._coming: dict[Path, Future[None]] = {}
        self._names: dict[Path, tuple[Store, Name]] = {}
        self._used: dict[Path, int] = {}
        self._uses = itertools.count(1)
        self._writing = 0  # bytes that have room, and are not counted on disk yet
        self._bytes: int | None = None  # on disk, when last looked, and what was written since
        self._lock = threading.RLock()
        self._locks = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(FETCHERS, "actstore-fetch")

    def open(self, address: str) -> Store:
        """Open a sealed store in a bucket, for reading and training.

        Args:
            address: s3://BUCKET/PREFIX#HASH, or another URL of `open_bucket`; HASH is a digest or a unique prefix of one.

        Raises: UsageError, StoreNotFound, StoreNotSealed, StoreDamaged, FormatError, StorageFailed, DiskFull.
        """
        url, _, prefix = address.partition("#")
        bucket = open_bucket(url)
        manifest, moments, _ = remote_manifest(bucket, find_remote(bucket, prefix))
        store = Store(self.folder / manifest.content_digest / manifest.store, manifest, moments, self)
        lock = StorePaths(store.path.parent, store.digest).lock
        with contextlib.suppress(StoreLocked), durable.lock(lock, f"a clean-up, pid {os.getpid()}"):
            durable.remove_tree(store.path / "tmp")  # of a process that was killed
        self._locks.enter_context(durable.lock(lock, "", shared=True, wait=True))
        for folder in (*arrays_of(store.dtype), "row_groups"):
            durable.make_dir(store.path / folder)
        for name in sorted(manifest.files):
            try:
                check_small_file(store.path, name, manifest, moments)
            except ActstoreError:  # not there yet
                data = remote_small_file(bucket, name, manifest, moments)
                durable.write_new(store.path, name, [data], mode=READ_ONLY, replace=True)
        self._stores[store.path] = store, bucket
        return store

    def close(self) -> None:
        """Stop fetching; the files stay."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._locks.close()

    def __enter__(self) -> Cache:
        """Return the cache."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def fetch(self, store: Store, array: str, group: int, again: bool = False) -> None:
        """Have one file of a row group in the folder when this returns; see `ChunkSource`.

        Raises: StoreDamaged: what arrived is not what the manifest names. StorageFailed, DiskFull, UsageError.
        """
        if again:
            durable.remove_file(_path(store, array, group))
        self._start(store, array, group).result()

    def want(self, store: Store, array: str, groups: Iterable[int]) -> None:
        """Begin to fetch chunks, and keep those of the last two calls for this array; see `ChunkSource`.

        Raises: UsageError: the cache cannot hold them.
        """
        groups, manifest = list(groups), store.manifest
        each = chunk_bytes(array, manifest.group_rows, store.d_model, store.dtype)
        with self._lock:
            calls = self._wanted.setdefault((store.path, array), deque(maxlen=2))
            calls.append({_path(store, array, group): each for group in groups})
            self._refuse_over(sum(self._kept().values()))
        for group in groups:
            self._start(store, array, group)

    def _start(self, store: Store, array: str, group: int) -> Future[None]:
        """Return a future that is done when the file is there; fetching begins unless it is there, or on its way."""
        path = _path(store, array, group)
        with self._lock:
            self._used[path] = next(self._uses)
            self._names[path] = store, (array, group)
            if path in self._coming:
                return self._coming[path]
            if os.path.lexists(path):
                there: Future[None] = Future()
                there.set_result(None)
                return there
            self._coming[path] = self._pool.submit(self._bring, store.path, array, group)
            return self._coming[path]

    def _bring(self, place: Path, array: str, group: int) -> None:
        """Fetch one file, in a thread of the pool; a chunk's record first."""
        store, bucket = self._stores[place]
        path = _path(store, array, group)
        try:
            if array == "row_groups":
                name, data = record_name(group), memoryview(remote_record(bucket, store, group)[1])
            else:
                if not os.path.lexists(place / record_name(group)):
                    self._bring(place, "row_groups", group)
                name, data = chunk_name(array, group), remote_chunk(bucket, store, store.record(group), array)
            with self._lock:
                self._make_room(len(data))
                self._writing += len(data)
            try:
                durable.write_new(place, name, [data], mode=READ_ONLY, replace=True)
            finally:
                with self._lock:
                    self._writing -= len(data)
                    self._bytes = (self._bytes or 0) + len(data)
        finally:
            with self._lock:
                self._coming.pop(path, None)

    def _kept(self) -> dict[Path, int]:
        """Return the files that must stay, with their bytes."""
        return {path: size for calls in self._wanted.values() for call in calls for path, size in call.items()}

    def _make_room(self, needed: int) -> None:
        """Delete the chunks used longest ago where `needed` bytes more do not fit."""
        if self._bytes is not None and self._bytes + self._writing + needed <= self.limit_bytes:
            return
        files, kept = {Path(entry.path): entry.stat().st_size for entry in _files(self.folder)}, self._kept()
        self._bytes = sum(files.values())
        needed += self._writing
        for path in sorted(files, key=lambda p: self._used.get(p, 0)):
            if self._bytes + needed <= self.limit_bytes - self.limit_bytes // 64:  # a little more, to look seldom
                break
            if path.name.startswith("c.") and path not in kept and path not in self._coming:
                if path in self._names:
                    store, name = self._names[path]
                    store._maps.pop(name, None)
                durable.remove_file(path)
                self._bytes -= files[path]
        self._refuse_over(self._bytes + needed)

    def _refuse_over(self, needed: int) -> None:
        if needed > self.limit_bytes:
            raise UsageError(
                f"the cache may hold {self.limit_bytes} bytes, and two windows of rows need at least {needed}",
                str(self.folder), "give a larger --cache-size",
            )  # fmt: skip


def _path(store: Store, array: str, group: int) -> Path:
    return store.path / (record_name(group) if array == "row_groups" else chunk_name(array, group))


def _files(folder: Path) -> Iterable[os.DirEntry[str]]:
    """Yield every regular file below a folder; what another process deletes meanwhile is passed over."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and entry.name != "tmp":
                yield from _files(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield entry
