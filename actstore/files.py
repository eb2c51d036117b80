"""Reading below a folder: sizes first, regular files only, no link followed, and nothing that blocks.

A store or run may come from somebody else, so a name in it could lead anywhere. Every folder from the store's own
downwards is opened by itself, without following a link, and the next name is looked up in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from actstore import durable
from actstore.errors import FormatError, StorageFailed


@contextlib.contextmanager
def folder_below(root: Path, name: str = "") -> Iterator[int]:
    """Open the folder `root`, or `root/name`, for looking files up in it; no link is followed from `root` on.

    Yields: a descriptor of the folder, for `dir_fd`.
    Raises: FileNotFoundError: no such folder. FormatError: it, or one on the way, is a link or no folder. StorageFailed.
    """
    flags, descriptor = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, -1
    try:
        for part in (str(root), *filter(None, name.split("/"))):
            above, descriptor = descriptor, _open(part, flags, root / name, "folder", descriptor)
            if above >= 0:
                os.close(above)
        yield descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _open(name: str, flags: int, path: Path, kind: str, folder: int = -1) -> int:
    """Open `name` in an open folder; what is not of the kind asked for is refused, not followed."""
    try:
        return os.open(name, flags, dir_fd=None if folder < 0 else folder)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise FormatError(f"not a {kind}", where=str(path)) from error
        raise StorageFailed(f"open failed: {error.strerror}", where=str(path)) from error


def regular_size(folder: int, name: str, path: Path) -> int:
    """Return the size in bytes of a regular file in an open folder, links not followed.

    Raises: FileNotFoundError. FormatError: a link, folder or device; `path` names it. StorageFailed.
    """
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageFailed(f"stat failed: {error.strerror}", where=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("not a regular file", where=str(path))
    return status.st_size


@contextlib.contextmanager
def opened(root: Path, name: str) -> Iterator[tuple[int, int]]:
    """Open the file `root/name` for reading; no link is followed from `root` on, and nothing blocks on a FIFO.

    Yields: (descriptor, size in bytes).
    Raises: FileNotFoundError: no such file. FormatError: it is a link, folder or device, or a folder on the way is a
        link. StorageFailed: anything else, also while it is open.
    """
    path, (above, _, base) = root / name, name.rpartition("/")
    with folder_below(root, above) as folder:
        descriptor = _open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, path, "regular file", folder)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a regular file", where=str(path))
        yield descriptor, status.st_size
    except OSError as error:
        raise StorageFailed(f"read failed: {error.strerror}", where=str(path)) from error
    finally:
        os.close(descriptor)


def file_stamp(descriptor: int) -> int:
    """Return 64 bits, never 0, that another file, or one written to since, has not: what was verified need not be again."""
    status = os.fstat(descriptor)
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)) & (1 << 64) - 1 | 1


def read_bounded(root: Path, name: str, limit_bytes: int) -> bytes:
    """Return the bytes of the regular file `root/name` after checking its size; opened as by `opened`.

    Raises: FileNotFoundError; FormatError: not a regular file or over the limit; StorageFailed: read error.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     durable.write_new(Path(folder), "a", [b"abc"])
        ...     read_bounded(Path(folder), "a", 3)
        b'abc'
    """
    with opened(root, name) as (descriptor, size):
        if size > limit_bytes:
            raise FormatError(f"{size} bytes, at most {limit_bytes} are allowed", where=str(root / name))
        durable.step("read", root / name)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(size)
