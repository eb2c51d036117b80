"""A sealed store as memory-mapped rows, each chunk verified when it is first touched.

Opening checks the manifest, the small files and, where there are few row groups, the size of every chunk. The first
read of a chunk checks its size, its row group's record against the manifest and the chunk's crc32c against the record. A
missing chunk is an error, never zeros. The chunks of a store in a bucket come when they are asked for (`ChunkSource`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore import zarr_array
from actstore.backends import Vocabulary
from actstore.errors import FormatError, StoreDamaged, UsageError
from actstore.files import folder_below, read_bounded, regular_size
from actstore.int8 import restore
from actstore.key import StoreKey, parse_record
from actstore.layout import VOCABULARY, arrays_of, chunk_name, record_name
from actstore.limits import MAX_RECORD_BYTES, MAX_VOCABULARY_BYTES
from actstore.manifest import Chunk, Manifest, RowGroup
from actstore.mapped import ChunkSource, map_chunk
from actstore.sealed import check_record, check_small_file, read_manifest
from actstore.stats import Moments
from actstore.zarr_array import chunk_bytes, chunk_shape, decode_chunk

if TYPE_CHECKING:
    import zarr

Array = npt.NDArray[Any]
Digests = Mapping[str, Chunk]
MAX_MAPS = 8192  # of one store: a Linux process may have 65,530


@dataclass(frozen=True)
class Store:
    """A sealed store. Make one with `actstore.open_store`.

    Args:
        path: its folder.
        manifest: its table of contents.
        statistics: moments of all its rows.
        source: of files that are not in the folder yet; None for a store on disk.

    Example:
        >>> store = actstore.open_store("3fa9")          # doctest: +SKIP
        >>> store[10_000:10_064].shape                   # doctest: +SKIP
        (64, 1024)
    """

    path: Path
    manifest: Manifest
    statistics: Moments
    source: ChunkSource | None = field(default=None, repr=False, compare=False)
    _maps: dict[tuple[str, int], Array] = field(default_factory=dict, repr=False, compare=False)  # the last MAX_MAPS
    _digests: dict[int, Digests] = field(default_factory=dict, repr=False, compare=False)  # of the last groups' chunks, checked
    _touched: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict, repr=False, compare=False)  # stamps
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Rows in the store."""
        return self.manifest.rows

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return self.manifest.d_model

    @property
    def dtype(self) -> str:
        """Name of the stored dtype."""
        return self.manifest.key.dtype

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of rows as they are read: the stored one, and float32 for int8."""
        return zarr_array.row_dtype(self.dtype)

    @property
    def key(self) -> StoreKey:
        """What the store is derived from."""
        return self.manifest.key

    @property
    def digest(self) -> str:
        """SHA-256 of the key; the folder's name."""
        return self.manifest.store

    @property
    def content_digest(self) -> str:
        """Merkle root over the key, the row count and every chunk."""
        return self.manifest.content_digest

    @property
    def bytes(self) -> int:
        """Bytes of the chunk files on disk."""
        n, fixed = len(self.manifest.groups), [a for a in arrays_of(self.dtype) if a != "exact"]
        each = sum(chunk_bytes(a, self.manifest.group_rows, self.d_model, self.dtype) for a in fixed)
        exact = (self.path / chunk_name("exact", g) for g in range(n if self.dtype == "int8" else 0))
        return n * each + sum(os.lstat(path).st_size for path in exact if self.source is None or os.path.lexists(path))

    @cached_property
    def acts(self) -> zarr.Array:  # type: ignore[type-arg]
        """The activations as a plain zarr array (rows, d_model), for other people's tools; checked by crc32c alone."""
        import zarr

        import actstore.bfloat16  # noqa: F401 - registers the type

        if self.source is not None:  # zarr would read NaN where a chunk has not come yet
            raise UsageError("a store in a bucket has no zarr array here", self.digest[:12], "`actstore pull` it first")

        array = zarr.open_group(self.path, mode="r")["acts"]
        assert isinstance(array, zarr.Array)
        return array

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The text of each token id and the special ids, as kept in the store."""
        return parse_record(Vocabulary, read_bounded(self.path, VOCABULARY, MAX_VOCABULARY_BYTES), VOCABULARY)

    def size_problem(self, array: str, group: int, size: int) -> str:
        """Return what is wrong with the size of a chunk file, or ""."""
        return zarr_array.size_problem(array, size, self.rows_of(group), self.manifest.group_rows, self.d_model, self.dtype)

    def rows_of(self, group: int) -> int:
        """Return the number of rows in a row group."""
        return min(self.manifest.group_rows, self.rows - group * self.manifest.group_rows)

    def record(self, group: int) -> RowGroup:
        """Return a row group's commit record, checked against the manifest. Raises: StoreDamaged."""
        if self.source is not None:
            self.source.fetch(self, "row_groups", group)
        try:
            return check_record(read_bounded(self.path, record_name(group), MAX_RECORD_BYTES), group, self.manifest)
        except (FileNotFoundError, FormatError, StoreDamaged) as error:
            missing = f"record {record_name(group)}: missing"
            raise self._damaged(missing if isinstance(error, FileNotFoundError) else error.what, group) from error

    def _damaged(self, what: str, group: int) -> StoreDamaged:
        start = group * self.manifest.group_rows
        stop = min(self.rows, start + self.manifest.group_rows)
        where = f"store {self.digest[:12]}, rows {start} to {stop - 1}, {self.path}"
        do = f"`actstore verify {self.digest[:12]} --data` lists all damage, `actstore repair` mends it"
        return StoreDamaged(what, where, do)

    def chunk(self, array: str, group: int) -> Array:
        """Return the rows of one chunk, memory-mapped and read-only; verified when first touched.

        Args:
            array: "acts", "tokens", "documents" or "positions".
            group: index of the row group.
        Returns: (rows of the group, d_model) in `row_dtype` (int8 rows are computed), or (rows of the group,) int32.
        Raises: StoreDamaged, StorageFailed.
        """
        return self._rows(array, group, slice(None))

    def _rows(self, array: str, group: int, rows: slice | npt.NDArray[np.int64], out: Array | None = None) -> Array:
        """Return some rows of one chunk, int8 undone: a view where possible and no `out` is given."""
        if array == "acts" and self.dtype == "int8":
            codes, scale, columns, exact = (self._stored(a, group) for a in ("acts", "scale", "columns", "exact"))
            return restore(codes, scale, columns[0], exact, rows, out)
        stored = self._stored(array, group)
        return stored[rows] if isinstance(rows, slice) else np.take(stored, rows, axis=0, out=out, mode="clip")

    def _stored(self, array: str, group: int) -> Array:
        found = self._maps.get((array, group))
        if found is None:
            with self._lock:
                found = self._maps.get((array, group))  # another thread may have mapped it meanwhile
                if found is None:
                    if len(self._maps) >= MAX_MAPS:  # who still has rows of the oldest keeps it mapped
                        self._maps.pop(next(iter(self._maps)), None)
                    found = self._maps[array, group] = self._fetched(array, group)
        return found

    def _fetched(self, array: str, group: int) -> Array:
        if self.source is None:
            return self._map(array, group)
        self.source.fetch(self, array, group)
        try:
            return self._map(array, group)
        except StoreDamaged:  # whole when it came: the disk changed it, or another process made room
            self.source.fetch(self, array, group, again=True)
            return self._map(array, group)

    def _map(self, array: str, group: int) -> Array:
        touched = self._touched.setdefault(array, np.zeros(len(self.manifest.groups), np.uint64))
        size_problem, crc32c = partial(self.size_problem, array, group), partial(self._crc32c, array, group)
        try:
            mapped, touched[group] = map_chunk(self.path, chunk_name(array, group), size_problem, int(touched[group]), crc32c)
        except StoreDamaged as error:
            raise error if error.where else self._damaged(error.what, group) from error
        return decode_chunk(array, mapped, self.rows_of(group), self.manifest.group_rows, self.d_model, self.dtype)

    def _crc32c(self, array: str, group: int) -> int:
        if group not in self._digests:
            if len(self._digests) >= MAX_MAPS:
                del self._digests[next(iter(self._digests))]
            self._digests[group] = self.record(group).chunks  # type: ignore[assignment]
        return self._digests[group][array].crc32c

    def want(self, array: str, groups: Iterable[int]) -> None:
        """Say which chunks are read soon, so that those of a store in a bucket are on their way; free on disk."""
        if self.source is not None:
            for each in ("acts", "scale", "columns", "exact") if array == "acts" and self.dtype == "int8" else (array,):
                self.source.want(self, each, groups)

    def read(self, array: str, start: int, stop: int) -> Array:
        """Return rows [start, stop) of one array: a view when they lie in one row group, a copy otherwise."""
        start, stop = max(0, start), min(stop, self.rows)
        if stop <= start:
            return self._rows(array, 0, slice(0, 0))
        size, pieces = self.manifest.group_rows, []
        self.want(array, range(start // size, min(2 * stop - start - 1, self.rows - 1) // size + 1))  # and as much again
        for group in range(start // size, (stop - 1) // size + 1):
            pieces.append(self._rows(array, group, slice(max(0, start - group * size), stop - group * size)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def forget(self, row: int) -> None:
        """Unmap the chunks that lie before a row, so that a pass over many rows has only a few of them in memory."""
        with self._lock:
            for name, group in [key for key in self._maps if (key[1] + 1) * self.manifest.group_rows <= row]:
                del self._maps[name, group]

    def __getitem__(self, rows: slice) -> Array:
        """Return activations of a slice of rows, (n, d_model) in `row_dtype`; a read-only view where possible."""
        start, stop, stride = rows.indices(self.rows)
        if stride != 1:
            raise IndexError("a store is sliced with step 1; use `take` for other rows")
        return self.read("acts", start, stop)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.rows

    def take(self, array: str, rows: npt.NDArray[np.int64], out: Array | None = None) -> Array:
        """Gather rows by number, in the given order; sorted rows read the disk in order.

        Args:
            array: "acts", "tokens", "documents" or "positions".
            rows: (n,) int64, each in [0, rows); sorted ascending.
            out: array to fill, (n, …) of the array's dtype; made when None.
        Returns: `out`.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} are asked for, the store has 0 to {self.rows - 1}")
        shape = (len(rows), *chunk_shape(array, 1, self.d_model)[1:])
        out = np.empty(shape, self.row_dtype if array == "acts" else np.int32) if out is None else out
        size, at = self.manifest.group_rows, 0
        if self.source is not None:
            self.want(array, np.unique(rows // size).tolist())
        while at < len(rows):
            group = int(rows[at]) // size
            stop = at + int(np.searchsorted(rows[at:], (group + 1) * size))
            self._rows(array, group, rows[at:stop] - group * size, out[at:stop])
            at = stop
        return out


def open_folder(path: Path) -> Store:
    """Open the sealed store in a folder: parse the manifest, check the small files and the size of every chunk.

    Raises: StoreNotSealed: no manifest. FormatError: the manifest is damaged or of another version or store.
        StoreDamaged: a file is missing, damaged or has another size.
    """
    store = open_unchecked(path)
    for name in sorted(store.manifest.files):
        check_small_file(path, name, store.manifest, store.statistics)
    for array in arrays_of(store.dtype) if store.manifest.format == 1 else ():  # format 2 has a million: at first touch
        with folder_below(path, array) as folder:
            for group in range(len(store.manifest.groups)):
                name = chunk_name(array, group)
                try:
                    found = regular_size(folder, name.rpartition("/")[2], path / name)
                except FileNotFoundError as error:
                    raise store._damaged(f"chunk {name} is missing", group) from error
                if problem := store.size_problem(array, group, found):
                    raise store._damaged(f"chunk {name} {problem}", group)
    return store


def open_unchecked(path: Path) -> Store:
    """Open a sealed store that may be damaged: only its manifest is parsed and trusted. For checking and repair.

    Raises: StoreNotSealed: no manifest. FormatError: the manifest is damaged or of another version or store.
    """
    return Store(path, *read_manifest(path))
