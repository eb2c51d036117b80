"""One chunk file as memory: checked by reading it, then mapped; and where the files of a store in a bucket come from."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import google_crc32c

from actstore.errors import StoreDamaged
from actstore.files import file_stamp, opened
from actstore.limits import MIB
from actstore.zarr_array import CRC_BYTES


class ChunkSource(Protocol):
    """Where files come from that a store's folder need not have; `store` is an `actstore.reader.Store`."""

    def fetch(self, store: Any, array: str, group: int, again: bool = False) -> None:
        """Have one file of a row group in the folder; "row_groups" is its record. `again`: the one there is damaged."""

    def want(self, store: Any, array: str, groups: Iterable[int]) -> None:
        """Begin to fetch chunks that are needed soon; of each array those of the last two calls stay in the folder."""


def map_chunk(
    root: Path, name: str, size_problem: Callable[[int], str], stamp: int, crc32c: Callable[[], int]
) -> tuple[mmap.mmap, int]:
    """Return the bytes of a chunk file, mapped read-only, and its stamp; the crc32c is checked by `read`, not through the map.

    Args:
        root: the store's folder.
        name: the file below it.
        size_problem: says what is wrong with its size in bytes, or "".
        stamp: of the file when it was checked last, or 0; the same file need not be read again.
        crc32c: returns what its record names.

    Raises: StoreDamaged: missing, or other bytes. FormatError: not a regular file. StorageFailed.
    """
    try:
        with opened(root, name) as (descriptor, size):
            if problem := size_problem(size):
                raise StoreDamaged(f"chunk {name} {problem}")
            if stamp != (now := file_stamp(descriptor)):
                wanted, found = crc32c(), _crc32c(descriptor, size - CRC_BYTES)
                trailer = int.from_bytes(os.pread(descriptor, CRC_BYTES, size - CRC_BYTES), "little")
                if not found == trailer == wanted:
                    raise StoreDamaged(
                        f"chunk {name} has crc32c {found:08x} ({trailer:08x} in the file), its record says {wanted:08x}"
                    )
            return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), now
    except FileNotFoundError as error:
        raise StoreDamaged(f"chunk {name} is missing") from error


def _crc32c(descriptor: int, size: int) -> int:
    """Return the crc32c of a file's first `size` bytes, read in pieces; of what is there when the file is shorter."""
    crc, at = 0, 0
    while at < size and (piece := os.pread(descriptor, min(4 * MIB, size - at), at)):
        crc, at = google_crc32c.extend(crc, piece), at + len(piece)
    return crc
