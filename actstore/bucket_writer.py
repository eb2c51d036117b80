"""A store captured straight into a bucket, by any number of workers: nothing is kept on this machine's disk.

What counts lies where a push puts it, below `<store digest>/`; the rest below `.staging/<store digest>/`, gone at the end:

    workers/<worker>            one byte longer with every beat of that worker; absent once it has ended
    claims/<group>.<n>          the worker that computes a row group; n counts those that took it over
    chunks/<group>.<array>.<sha256>   on their way: put, named by a record, copied to their final name, deleted

The commit point of a row group is its record, created and never overwritten: the first one wins, and what another worker
made of the same row group is dropped. Chunks get their final names by copies of what the record in the bucket names, so a
worker that was asleep while its claim went to another can change nothing, whatever it does when it wakes. Claims only
save work: they rest on no clock but the watcher's own. A worker is taken for dead when its object has gone, or when the
watcher itself has seen no beat for LEASE_SECONDS. Whoever finds all records claims the seal in the same way, completes the
copies, and creates the manifest. All this asks of a bucket is to create an object only if it is absent.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from actstore.arrivals import remote_manifest
from actstore.bucket import (
    Bucket,
    copy_object,
    create_object,
    delete_objects,
    list_objects,
    object_exists,
    read_object,
    write_object,
)  # fmt: skip
from actstore.digests import sha256_bytes
from actstore.errors import FormatError, StoreDamaged
from actstore.layout import GROUPS, MANIFEST, chunk_name, record_name
from actstore.limits import MAX_MANIFEST_BYTES, MAX_RECORD_BYTES
from actstore.manifest import Chunk, RowGroup, dump_record, seal_manifest
from actstore.seal import small_files
from actstore.sealed import check_small_bytes, small_file_limit
from actstore.stats import Moments
from actstore.writer import StoreWriter, read_groups
from actstore.zarr_array import size_problem

LEASE_SECONDS = 60.0  # without a beat, after which a worker's row groups are computed by others; it costs work, never data
BEATS = 4  # in that time
LOOK_SECONDS = 2.0  # between two looks at what the others did, at least; and ten times what a look took
THREADS = 8  # requests at once
SLICE = 64  # records in memory at once
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class BucketWriter(StoreWriter):
    """An unsealed store in a bucket, open for writing. Make one with `BucketPlace.writer`.

    Args:
        bucket: where it lies.
        worker: this worker's name, as random as a digest.
        home: prefix of the sealed store's objects.
        staging: prefix of everything else.
        note: called with a line worth telling.
    """

    bucket: Bucket
    worker: str
    home: str
    staging: str
    note: Callable[[str], None]
    threads: ClassVar[int] = THREADS
    copies: ClassVar[int] = 2  # rows, and the object made of them
    _sealed: bool = False
    _late: bool = False  # others did what this worker had claimed
    _next_look: float = 0.0
    _claimed: dict[int, tuple[int, str]] = field(default_factory=dict)  # the last claim of others on a row group: which, whose
    _beats: dict[str, tuple[int, float, bool]] = field(default_factory=dict)  # bytes, since when, whether it lives

    def is_sealed(self) -> bool:
        """Return whether the store had been sealed when this worker last looked."""
        return self._sealed

    def look_again(self) -> None:
        """Look at beats, records and manifest, unless that was just done. Raises: StorageFailed, StoreNotFound."""
        now = time.monotonic()
        if now < self._next_look:
            return
        # Beats first: a worker that has ended by then has all its records in the listing that follows.
        beats = dict(list_objects(self.bucket, f"{self.staging}/workers"))
        for worker, (size, since, _) in self._beats.items():
            there = beats.get(worker, 0)
            since = since if there == size else now
            self._beats[worker] = there, since, there > 0 and now - since < LEASE_SECONDS
        for name, _ in list_objects(self.bucket, f"{self.home}/row_groups"):
            if (found := re.fullmatch(r"([0-9]{1,15})\.json", name)) and int(found[1]) < self.n_groups:
                self.committed.setdefault(int(found[1]), "")  # it is read at the seal
        self._claimed = {index: claim for index, claim in self._claimed.items() if index not in self.committed}
        self._sealed = object_exists(self.bucket, f"{self.home}/{MANIFEST}")
        done = time.monotonic()
        self._next_look = done + max(LOOK_SECONDS, 10 * (done - now))

    def claims(self, groups: Iterable[int]) -> Iterator[contextlib.ExitStack | None]:
        """Yield what `try_claim` returns for each row group, several asked for at once."""
        if self._claimed or self._late:  # others are at work here
            self.look_again()
        return _parallel(self.try_claim, list(groups))

    def try_claim(self, index: int) -> contextlib.ExitStack | None:
        """Claim a row group that nobody alive has, as far as this worker knows; row group `n_groups` stands for the seal.

        Returns: the claim, which has nothing to close: it ends with the row group's record, or with this worker.
        Raises: StorageFailed, StoreNotFound.
        """
        last, owner = self._claimed.get(index, (-1, ""))
        if self._sealed or index in self.committed or (owner and self._beats[owner][2]):
            return None
        name = f"{self.staging}/claims/{index}.{last + 1}"
        owner = create_object(self.bucket, name, self.worker.encode(), 1024).decode("latin-1")
        if owner != self.worker:
            self._claimed[index] = last + 1, owner
            self._beats.setdefault(owner, (0, time.monotonic(), True))  # until the next look
            return None
        if last >= 0 and index < self.n_groups:
            self.note(f"row group {index} is computed here: the worker that had it has ended, or gives no sign")
        return contextlib.ExitStack()

    def _staged(self, index: int, array: str, chunk: Chunk) -> str:
        return f"{self.staging}/chunks/{index}.{array}.{chunk.sha256}"

    def put_chunk(self, index: int, array: str, buffers: list[memoryview], chunk: Chunk) -> None:
        """Write one chunk under its own SHA-256: nobody's bytes are overwritten by others. Raises: StorageFailed."""
        write_object(self.bucket, self._staged(index, array, chunk), b"".join(buffers))

    def commit(self, index: int, chunks: dict[str, Chunk], moments: Moments) -> None:
        """Create the record of a row group, the commit point, and copy its chunks to their names, unless another did.

        Raises: StorageFailed, StoreNotFound: it may be committed or not; the same command finds out.
        """
        mine = dump_record(self.row_group(index, chunks, moments))
        if create_object(self.bucket, f"{self.home}/{record_name(index)}", mine, MAX_RECORD_BYTES) == mine:
            self._place(index, chunks)
        else:
            self.note(f"row group {index} was committed by another worker first; what was made of it here is dropped")
            self._late = True
        self.committed[index] = ""

    def _place(self, index: int, chunks: dict[str, Chunk]) -> None:
        """Copy the chunks that a committed record names to their final names; those that are there already are not staged."""
        for array, chunk in chunks.items():
            with contextlib.suppress(FileNotFoundError):
                copy_object(self.bucket, self._staged(index, array, chunk), f"{self.home}/{chunk_name(array, index)}")
        delete_objects(self.bucket, [self._staged(index, array, chunk) for array, chunk in chunks.items()])

    def read_committed(self, index: int) -> tuple[RowGroup, Moments] | None:
        """Return a committed row group whose record is intact, or None. Raises: StorageFailed, StoreNotFound."""
        try:
            return self.parse(index, bytes(read_object(self.bucket, f"{self.home}/{record_name(index)}", MAX_RECORD_BYTES)))
        except (FileNotFoundError, FormatError):
            return None

    def records(self) -> Iterator[tuple[RowGroup, Moments] | None]:
        """Yield what `read_committed` returns for each row group."""
        return _parallel(self.read_committed, range(self.n_groups))

    def seal_once(self, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Seal the complete store, or wait until the worker that does has; see `seal`."""
        while not object_exists(self.bucket, f"{self.home}/{MANIFEST}"):
            if self.try_claim(self.n_groups) is not None:
                self.seal(vocabulary, provenance)
            else:
                time.sleep(LOOK_SECONDS)
                self.look_again()

    def seal(self, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Seal the complete store; several workers may do so at once. See `seal.seal`.

        Raises: StoreDamaged: an object is missing, or not what it must be. StorageFailed: the same command goes on.
        """
        staged = {name.partition(".")[0] for name, _ in list_objects(self.bucket, f"{self.staging}/chunks")}
        for _ in _parallel(self._finish, [i for i in range(self.n_groups) if str(i) in staged]):
            pass
        groups, moments = read_groups(self)
        self._check_objects(len(groups))
        manifest = seal_manifest(self.key, self.rows, self.d_model, groups, {}, moments, provenance)
        files = {}
        for name, data in small_files(manifest, moments, vocabulary).items():  # the first sealer's: it may be of another version
            files[name] = create_object(self.bucket, f"{self.home}/{name}", data, small_file_limit(name))
            if name == GROUPS and files[name] != data:
                raise self._damaged(name, "is not the table of these row groups")
        manifest = manifest.model_copy(update={"files": {name: sha256_bytes(data) for name, data in files.items()}})
        for name, data in files.items():
            check_small_bytes(name, data, manifest, moments, f"{self.bucket.url}/{self.home}")
        create_object(self.bucket, f"{self.home}/{MANIFEST}", dump_record(manifest), MAX_MANIFEST_BYTES)
        theirs, _, _ = remote_manifest(self.bucket, self.home)
        if theirs.content_digest != manifest.content_digest:
            raise self._damaged(MANIFEST, "is not that of the row groups there")

    def _finish(self, index: int) -> None:
        """Do the copies of a row group whose worker did not come to it."""
        if (found := self.read_committed(index)) is not None:
            self._place(index, {str(array): chunk for array, chunk in found[0].chunks.items()})

    def _check_objects(self, intact: int) -> None:
        """Refuse to seal what is not whole: `intact` records from the first on, and each chunk in its place with its size."""
        if intact < self.n_groups:
            raise self._damaged(record_name(intact), "is missing, or not the record of this row group")
        there = dict(list_objects(self.bucket, self.home))
        for index, array in itertools.product(range(self.n_groups), self.arrays):
            start, stop = self.span(index)
            size, wanted = there.get(chunk_name(array, index)), (stop - start, self.group_rows, self.d_model, self.key.dtype)
            if problem := "is missing" if size is None else size_problem(array, size, *wanted):
                raise self._damaged(record_name(index), f"names chunk {chunk_name(array, index)}, which {problem}")

    def _damaged(self, name: str, what: str) -> StoreDamaged:
        do = "delete this object and run the command again"
        return StoreDamaged(f"object {name} {what}", f"{self.bucket.url}/{self.home}/{name}", do)


def _parallel(work: Callable[[int], T], items: range | list[int]) -> Iterator[T]:
    """Yield the results of work in the order of the items; done in threads, a slice of the items at a time."""
    with ThreadPoolExecutor(THREADS, "actstore-bucket") as pool:
        for at in range(0, len(items), SLICE):
            yield from pool.map(work, items[at : at + SLICE])
