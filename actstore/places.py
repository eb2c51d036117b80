"""Where a capture puts its stores: a folder on disk, or a bucket (`bucket_writer`). The capture asks both the same."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore import bucket_writer, durable
from actstore.arrivals import remote_manifest
from actstore.bucket import Bucket, create_object, delete_objects, list_objects, open_bucket, write_object
from actstore.bucket_writer import BEATS, BucketWriter
from actstore.errors import StorageFailed, StoreDamaged, StoreLocked, StoreNotFound, StoreNotSealed
from actstore.key import StoreKey, store_digest
from actstore.layout import MANIFEST, StorePaths, stores_folder
from actstore.limits import MAX_ROWS
from actstore.link import sources_for
from actstore.reader import Store
from actstore.seal import seal_once
from actstore.sealed import read_manifest
from actstore.writer import StoreWriter, open_writer, writing


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """A folder of stores on a disk.

    Args:
        stores: the folder.
    """

    stores: Path

    def __str__(self) -> str:
        """Return the folder, for messages."""
        return str(self.stores)

    def free_bytes(self) -> int | None:
        """Return the bytes that may still be written there; None where nobody can say."""
        return durable.free_bytes(self.stores)

    def sealed_rows(self, digest: str) -> int | None:
        """Return the rows of a sealed store, or None. Raises: StoreDamaged, FormatError: what lies in its place is no store."""
        sealed = StorePaths(self.stores, digest).sealed
        if not os.path.lexists(sealed):
            return None
        if not (sealed / MANIFEST).is_file():
            raise StoreDamaged(
                "this is no finished store: it has no manifest, as after half a copy",
                str(sealed),
                f"copy it again, or `actstore rm {digest[:12]}` and run the command again",
            )
        return read_manifest(sealed)[0].rows

    def holding(self, digest: str, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Hold a store for a capture; see `writing`."""
        return writing(StorePaths(self.stores, digest), shared)

    def spool(self, digest: str) -> Path | None:
        """Return an existing folder for what is read of a hub stream, or None where there is none."""
        folder = StorePaths(self.stores, digest).staging
        durable.make_dir(folder)
        return folder

    def writer(self, key: StoreKey, rows: int, d_model: int) -> StoreWriter:
        """Return the writer of a key's store, not open yet; see `open`."""
        return StoreWriter(StorePaths(self.stores, store_digest(key)), key, rows, d_model)

    def sources(self, writer: StoreWriter, locks: contextlib.ExitStack | None = None) -> list[Store]:
        """Return the stores to share row groups with, each locked against removal until `locks` is closed."""
        found = []
        for source in sources_for(writer.key, writer.paths.digest, self.stores):
            with contextlib.suppress(StoreLocked):  # it is being removed or repaired
                if locks is not None:
                    locks.enter_context(durable.lock(StorePaths(self.stores, source.digest).lock, "", shared=True))
                found.append(source)
        return found

    def open(self, writer: StoreWriter, shared: bool) -> StoreWriter:
        """Return the writer opened, its store held; see `open_writer`."""
        return open_writer(writer.paths, writer.key, writer.rows, writer.d_model, shared)

    def seal(self, writer: StoreWriter, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Seal a complete store unless another process has just done so; see `seal_once`."""
        seal_once(writer, vocabulary, provenance)

    @contextlib.contextmanager
    def scratch(self, key: StoreKey, d_model: int) -> Iterator[StoreWriter]:
        """Open a store of one row group, to time the writing of it; nothing is left behind."""
        paths = StorePaths(self.stores, store_digest(key))
        with durable.lock(paths.lock, "a calibration"):
            rows = StoreWriter(paths.scratch, key, MAX_ROWS, d_model).group_rows
            try:
                yield open_writer(paths.scratch, key, rows, d_model)
            finally:
                for leftover in (paths.scratch.staging, paths.scratch.claims):
                    durable.remove_tree(leftover)


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """A prefix of a bucket, as a capture sees it; see `FolderPlace` for the same of a folder.

    Args:
        bucket: the bucket and prefix.
        note: called with a line worth telling.
        worker: the name of this capture among those that share its stores.
    """

    bucket: Bucket
    note: Callable[[str], None]
    worker: str = field(default_factory=lambda: secrets.token_hex(16))

    def __str__(self) -> str:
        """Return the URL, for messages."""
        return self.bucket.url

    def free_bytes(self) -> int | None:
        """Return None: a bucket says nothing of its room."""
        return None

    def sealed_rows(self, digest: str) -> int | None:
        """Return the rows of a sealed store, or None. Raises: FormatError: its manifest is damaged. StorageFailed."""
        with contextlib.suppress(StoreNotFound, StoreNotSealed):
            return remote_manifest(self.bucket, digest)[0].rows
        return None

    @contextlib.contextmanager
    def holding(self, digest: str, shared: bool) -> Iterator[None]:
        """Let the other workers of a store see that this one lives; a capture in a bucket is always shared.

        Raises: StorageFailed: the bucket overwrites what it was told to create. StoreNotFound.
        """
        name, ended = f".staging/{digest}/workers/{self.worker}", threading.Event()
        create_object(self.bucket, name, b".", 1)
        with contextlib.suppress(FileExistsError):
            write_object(self.bucket, name, b".", create=True)
            do = "capture into a folder with --stores, and `actstore push` it"
            raise StorageFailed("this object store ignores If-None-Match, so workers cannot share it", self.bucket.url, do)

        def beat() -> None:
            for n in itertools.count(2):
                if ended.wait(bucket_writer.LEASE_SECONDS / BEATS):
                    return
                with contextlib.suppress(StorageFailed, StoreNotFound):  # at worst others do the same work
                    write_object(self.bucket, name, b"." * n)

        thread = threading.Thread(target=beat, name="actstore-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()  # else a beat under way would bring the object back
            with contextlib.suppress(StorageFailed, StoreNotFound):
                delete_objects(self.bucket, [name])

    def spool(self, digest: str) -> Path | None:
        """Return None: what is read of a hub stream is not kept in a bucket."""
        return None

    def writer(self, key: StoreKey, rows: int, d_model: int, scratch: str = "") -> BucketWriter:
        """Return the writer of a key's store, or of a scratch folder in its place."""
        paths = StorePaths(Path(), store_digest(key))  # its digest counts; nothing lies on this disk
        home, staging = scratch or paths.digest, scratch or f".staging/{paths.digest}"
        return BucketWriter(
            paths, key, rows, d_model, bucket=self.bucket, worker=self.worker, home=home, staging=staging, note=self.note
        )

    def sources(self, writer: StoreWriter, locks: contextlib.ExitStack | None = None) -> list[Store]:
        """Return no stores: nothing is linked in a bucket."""
        return []

    def open(self, writer: StoreWriter, shared: bool) -> StoreWriter:
        """Return the writer, which has looked at what is there."""
        writer.look_again()
        return writer

    def seal(self, writer: StoreWriter, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Seal a complete store unless another worker has done so, and delete what is staged."""
        assert isinstance(writer, BucketWriter)
        writer.seal_once(vocabulary, provenance)
        self._sweep(writer.staging)

    def _sweep(self, folder: str) -> None:
        delete_objects(self.bucket, [f"{folder}/{name}" for name, _ in list_objects(self.bucket, folder)])

    @contextlib.contextmanager
    def scratch(self, key: StoreKey, d_model: int) -> Iterator[StoreWriter]:
        """Open a store of one row group, to time the writing of it; nothing is left behind."""
        home = f".staging/{store_digest(key)}/scratch/{self.worker}"
        rows = self.writer(key, MAX_ROWS, d_model).group_rows
        try:
            yield self.writer(key, rows, d_model, home)
        finally:
            self._sweep(home)


Place = FolderPlace | BucketPlace


def place_of(stores: Path | str | None, note: Callable[[str], None] = lambda line: None) -> Place:
    """Return the place that `--stores` names: a folder, or a URL of `open_bucket`.

    Args:
        stores: None is `stores_folder`'s default.
        note: called with a line worth telling.

    Raises: UsageError: a URL that is none of ours, or obstore is not installed.
    """
    named = str(stores or os.environ.get("ACTSTORE_STORES") or "")
    return BucketPlace(open_bucket(named, make=True), note) if "://" in named else FolderPlace(stores_folder(stores))
