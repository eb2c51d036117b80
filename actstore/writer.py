"""Row groups into an unsealed store, an unsealed store into a sealed one: the commit protocol (reliability.md, section 3).

Order of writing: key.json; for each row group its chunks, then its record (the commit point); at the end
vocabulary.json and the zarr.json files, then manifest.json, then one rename from .staging/ to its place (the seal
point). Every file goes through `durable.write_new`. A row group is a pure function of (key, index), so resuming is
writing the missing ones, in any order and by any number of processes: whoever computes a row group holds its claim,
a lock that the kernel frees when that process dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy.typing as npt

from actstore import durable
from actstore.digests import canonical_json
from actstore.errors import FormatError, StoreLocked
from actstore.files import folder_below, read_bounded, regular_size
from actstore.int8 import Quantised, quantise, restore
from actstore.key import StoreKey, dump_key, store_digest
from actstore.layout import KEY, PLAN, StorePaths, arrays_of, chunk_name, record_name
from actstore.limits import MAX_RECORD_BYTES
from actstore.manifest import Chunk, RowGroup, dump_record, group_digest, parse_row_group, rows_per_group
from actstore.sealed import record_names
from actstore.stats import ROWS_AT_ONCE, Moments, dump_moments, merge, moments_of, no_rows
from actstore.timeline import Timeline
from actstore.zarr_array import chunk_bytes, encode_chunk, encode_exact, numpy_dtype, row_dtype, size_problem

Array = npt.NDArray[Any]
READ_ONLY = 0o444
EXACT_SHARE = 1 / 32  # of an int8 store's rows, planned for and seldom reached


@dataclass(slots=True)
class StoreWriter:
    """An unsealed store, open for writing. Make one with `open_writer`.

    Args:
        paths: where the store lies.
        key: what it is derived from.
        rows: rows it will have.
        d_model: width of a row.
        committed: digests of the row groups found on disk, by index; other processes may have committed more meanwhile.
            Their records stay on the disk: statistics of 4,096 dimensions take 300 kB of memory a row group.
    """

    paths: StorePaths
    key: StoreKey
    rows: int
    d_model: int
    committed: dict[int, str] = field(default_factory=dict)
    threads: ClassVar[int] = 1  # that write row groups at once
    copies: ClassVar[int] = 1  # of a row group in memory while it is written

    @property
    def group_rows(self) -> int:
        """Rows of every row group but the last."""
        return rows_per_group(self.d_model, self.key.dtype, self.rows)

    @property
    def n_groups(self) -> int:
        """Row groups the sealed store will have."""
        return -(-self.rows // self.group_rows)

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of the store."""
        return arrays_of(self.key.dtype)

    def span(self, group: int) -> tuple[int, int]:
        """Return the rows [start, stop) of a row group."""
        return group * self.group_rows, min(self.rows, (group + 1) * self.group_rows)

    def missing_row_groups(self) -> list[int]:
        """Return the indices of the row groups not committed yet."""
        return [i for i in range(self.n_groups) if i not in self.committed]

    @property
    def group_bytes(self) -> int:
        """Bytes that one row group takes on disk."""
        each = sum(chunk_bytes(a, self.group_rows, self.d_model, self.key.dtype) for a in self.arrays)
        if self.key.dtype == "int8":  # exact rows: 0.7 % in the worst layer measured
            each += int(self.group_rows * EXACT_SHARE) * self.d_model * 4
        return each + 64 * self.d_model + 4096  # and a record

    def is_sealed(self) -> bool:
        """Return whether the store has been sealed, by this process or by another."""
        return self.paths.sealed.is_dir()

    def look_again(self) -> None:
        """Find the row groups that have been committed since, by any process."""
        names = record_names(self.paths.staging)  # once, instead of a look for each of a million
        for index in self.missing_row_groups():
            if record_name(index) in names:
                self._note_committed(index)

    def _note_committed(self, index: int) -> bool:
        found = self.read_committed(index)
        if found is not None:
            self.committed[index] = group_digest(found[0])
        return found is not None

    def claims(self, groups: Iterable[int]) -> Iterator[contextlib.ExitStack | None]:
        """Yield what `try_claim` returns for each row group."""
        return map(self.try_claim, groups)

    def try_claim(self, index: int) -> contextlib.ExitStack | None:
        """Claim a missing row group for this process: nobody else computes it until the claim is closed, or we die.

        Returns: the claim; close it after `put_rows`. None when another process has it, or has committed it already.
        Raises: StorageFailed.
        """
        with contextlib.ExitStack() as claim:
            try:
                if self.is_sealed() or self._note_committed(index):  # without a lock file for each that others did
                    return None
                claim.enter_context(durable.lock(self.paths.claim(index), f"pid {os.getpid()}"))
            except StoreLocked:
                return None
            if self.is_sealed() or self._note_committed(index) or self.is_sealed():
                return None
            self._drop(index)
            return claim.pop_all()

    def read_committed(self, index: int) -> tuple[RowGroup, Moments] | None:
        """Return a committed row group whose record is intact and whose chunks are files of their size, or None."""
        start, stop = self.span(index)
        try:
            found = self.parse(index, read_bounded(self.paths.staging, record_name(index), MAX_RECORD_BYTES))
            for array in self.arrays:
                folder, _, name = chunk_name(array, index).rpartition("/")
                with folder_below(self.paths.staging, folder) as above:
                    size = regular_size(above, name, self.paths.staging / folder / name)
                if size_problem(array, size, stop - start, self.group_rows, self.d_model, self.key.dtype):
                    return None
        except (FileNotFoundError, FormatError):
            return None
        return found

    def records(self) -> Iterator[tuple[RowGroup, Moments] | None]:
        """Yield what `read_committed` returns for each row group."""
        return map(self.read_committed, range(self.n_groups))

    def parse(self, index: int, data: bytes) -> tuple[RowGroup, Moments] | None:
        """Return the row group in a record's bytes, or None where it is another store's or another one. Raises: FormatError."""
        group, moments = parse_row_group(data, record_name(index), self.d_model, self.key.dtype)
        start, stop = self.span(index)
        same = (group.store, group.index, group.rows) == (store_digest(self.key), index, stop - start)
        return (group, moments) if same else None

    def _drop(self, index: int) -> None:
        """Delete the remains of a row group that was not committed, record first."""
        for name in (record_name(index), *(chunk_name(array, index) for array in self.arrays)):
            if os.path.lexists(self.paths.staging / name):
                durable.remove_tree(self.paths.staging / name)

    def put_chunk(self, index: int, array: str, buffers: list[memoryview], chunk: Chunk) -> None:
        """Write one chunk of a claimed row group. Raises: DiskFull, StorageFailed."""
        durable.write_new(self.paths.staging, chunk_name(array, index), buffers, mode=READ_ONLY)

    def commit(self, index: int, chunks: dict[str, Chunk], moments: Moments) -> None:
        """Write the record of a row group whose chunks are all in place: the commit point.

        Raises: DiskFull, StorageFailed: the row group is not committed.
        """
        group = self.row_group(index, chunks, moments)
        durable.write_new(self.paths.staging, record_name(index), [dump_record(group)], mode=READ_ONLY)
        self.committed[index] = group_digest(group)

    def row_group(self, index: int, chunks: dict[str, Chunk], moments: Moments) -> RowGroup:
        """Return the record that commits a row group of these chunks."""
        start, stop = self.span(index)
        identity = {"store": self.paths.digest, "index": index, "rows": stop - start, "chunks": chunks}
        return RowGroup.model_validate({**identity, "statistics": dump_moments(moments)})


@contextlib.contextmanager
def writing(paths: StorePaths, shared: bool = False) -> Iterator[None]:
    """Hold a store's lock for a capture.

    Args:
        paths: where the store lies.
        shared: let other captures that share the work in as well; otherwise a second one is refused at once.

    Raises: StoreLocked: another process writes, reads or just sealed it. StorageFailed.
    """
    holder = "" if shared else f"a capture, pid {os.getpid()} on {socket.gethostname()}"
    with durable.lock(paths.lock, holder, shared=shared):
        if paths.sealed.is_dir() and not shared:
            raise StoreLocked(
                "another process sealed this store just now", str(paths.sealed), "run the command again: it is free"
            )
        yield


def open_writer(paths: StorePaths, key: StoreKey, rows: int, d_model: int, shared: bool = False) -> StoreWriter:
    """Open the unsealed store of a key, its lock held by `writing`: make its folders, find what is committed.

    Args:
        paths, key, rows, d_model: see StoreWriter.
        shared: other processes may be writing it too, so their temporary files stay.

    Raises: StorageFailed, DiskFull.
    """
    writer = StoreWriter(paths, key, rows, d_model)
    with durable.lock(paths.claim(None), f"pid {os.getpid()}", wait=True):
        if not writer.is_sealed():  # by another process, while this one read the corpus
            durable.make_dir(paths.staging)
            if not shared:
                durable.remove_tree(paths.staging / "tmp")
            for folder in (*writer.arrays, "row_groups"):
                if (paths.staging / folder).is_symlink() or (paths.staging / folder).is_file():
                    durable.remove_file(paths.staging / folder)  # not ours: what lies behind it is left alone
                durable.make_dir(paths.staging / folder)
            for name, data in ((KEY, dump_key(key)), (PLAN, canonical_json({"rows": rows, "d_model": d_model}))):
                if not (paths.staging / name).exists():
                    durable.write_new(paths.staging, name, [data], mode=READ_ONLY)
    writer.look_again()
    return writer


def read_groups(writer: StoreWriter) -> tuple[list[str], Moments]:
    """Return the digests of the committed row groups up to the first that is missing, and the moments of their rows."""
    groups: list[str] = []
    moments = no_rows(writer.d_model)
    for found in writer.records():
        if found is None:
            break
        groups.append(group_digest(found[0]))
        moments = merge(moments, found[1])
    return groups, moments


def put_rows(
    writer: StoreWriter,
    index: int,
    acts: Array,
    tokens: Array,
    documents: Array,
    positions: Array,
    timeline: Timeline | None = None,
) -> None:
    """Commit one row group: when this returns, neither a kill nor a power loss can take it.

    Args:
        writer: the open store.
        index: which row group.
        acts: (rows, d_model) from `to_stored`.
        tokens, documents, positions: (rows,) int32.
        timeline: counts what goes to digests and what to the disk.

    Raises: DiskFull, StorageFailed: the row group is not committed; those before it are.
    """
    start, stop = writer.span(index)
    arrays = {"acts": acts, "tokens": tokens, "documents": documents, "positions": positions}
    assert all(len(rows) == stop - start for rows in arrays.values()) and acts.dtype == row_dtype(writer.key.dtype)
    timeline = timeline or Timeline()
    with timeline.part("digest"):
        if writer.key.dtype == "int8":
            q = quantise(acts)
            arrays |= {"acts": q.codes, "scale": q.scale, "columns": q.columns[None], "exact": q.exact}
            moments = _moments_of_restored(q)
        else:
            moments = moments_of(acts)
    chunks: dict[str, Chunk] = {}
    for array, rows in arrays.items():
        assert array == "exact" or rows.dtype == numpy_dtype(array, writer.key.dtype), array
        whole = 1 if array == "columns" else writer.group_rows
        with timeline.part("digest"):
            buffers, chunks[array] = encode_exact(rows) if array == "exact" else encode_chunk(rows, whole)
        with timeline.part("write"):
            writer.put_chunk(index, array, buffers, chunks[array])
    with timeline.part("write"):
        writer.commit(index, chunks, moments)


def _moments_of_restored(q: Quantised) -> Moments:
    """Return the moments of an int8 row group as it will be read, which is not quite as it was given."""
    total = no_rows(q.codes.shape[1])
    for start in range(0, len(q.codes), ROWS_AT_ONCE):
        total = merge(total, moments_of(restore(q.codes, q.scale, q.columns, q.exact, slice(start, start + ROWS_AT_ONCE))))
    return total
