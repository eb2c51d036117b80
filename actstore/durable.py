"""The only module that writes, renames, deletes or locks: temp file, fsync, rename, fsync of the folder.

Every system call that changes the disk stands behind `step(name)`. In normal use that is one `if`; the crash tests
set `step_hook` to kill the process, raise an OSError or record the call at any of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from actstore.errors import DiskFull, StorageFailed, StoreLocked

Buffer = bytes | memoryview
NO_RIGHT = "name a folder that you may write to"
MENDED_BY = {errno.ENOTDIR: "a file lies in the place of a folder", errno.EACCES: NO_RIGHT, errno.EROFS: NO_RIGHT}
step_hook: Callable[[str, Path], None] | None = None
_held: set[int] = set()


def step(name: str, path: Path) -> None:
    """Announce the system call `name` on `path`, just before it is made. Tests hook in here."""
    if step_hook is not None:
        step_hook(name, path)


def _failed(error: OSError, call: str, path: Path, needed_bytes: int = 0) -> DiskFull | StorageFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path.parent)
        return DiskFull(
            f"the disk is full: {call} needs {needed_bytes} bytes, {free} are free",
            where=str(path),
            do="make space and run the same command again: what was committed is kept",
        )
    return StorageFailed(f"{call} failed: {error.strerror or error}", str(path), MENDED_BY.get(error.errno or 0, ""))


@contextlib.contextmanager
def _call(call: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Announce one system call and turn its OSError into the error a user sees."""
    try:
        step(call, path)
        yield
    except OSError as error:
        raise _failed(error, call, path, needed_bytes) from error


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write on the file system of `folder` (its nearest existing parent)."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power loss. Raises: StorageFailed."""
    with _call("fsync-folder", folder), _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def make_dir(folder: Path) -> None:
    """Make a folder and its missing parents, each durable in its parent. Raises: DiskFull, StorageFailed."""
    if folder.is_dir():
        return
    make_dir(folder.parent)
    with _call("mkdir", folder), contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


def _write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    for buffer in buffers:
        rest = memoryview(buffer).cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def write_new(root: Path, name: str, buffers: Sequence[Buffer], *, mode: int = 0o644, replace: bool = False) -> None:
    """Write a whole file so that it is either complete and durable under its name, or not there.

    Args:
        root: existing folder; the temporary file lies in `root/tmp/`, which is made when missing.
        name: path below `root` made of our own constants and integers, such as "acts/c.3.0".
        buffers: the file's bytes, in order; large arrays are not copied.
        mode: permission bits of the finished file.
        replace: allow the name to exist (a run's metrics; never a chunk).

    Raises: DiskFull, StorageFailed: nothing is left under the name, and no temporary file.
    """
    target, temporary = root / name, root / "tmp" / f"{os.getpid()}-{secrets.token_hex(8)}"
    if not replace and target.exists():
        raise StorageFailed("refusing to overwrite a committed file", where=str(target))
    make_dir(temporary.parent)
    needed = sum(memoryview(b).nbytes for b in buffers)
    descriptor = -1
    try:
        with _call("open", temporary, needed):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with _call("write", temporary, needed):
            _write_all(descriptor, buffers)
        with _call("fsync", temporary, needed):
            os.fsync(descriptor)
        with _call("close", temporary, needed):
            closing, descriptor = descriptor, -1
            os.close(closing)
        with _call("rename", target, needed):
            os.rename(temporary, target)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def link(source: Path, root: Path, name: str) -> bool:
    """Give a finished file a second name, durably.

    Args:
        source: a read-only file that is never written again.
        root: existing folder on the same disk.
        name: the new name below `root`; must not exist.

    Returns: False when the file system has no hard links, or no more of them for this file; nothing was done then.
    Raises: DiskFull, StorageFailed.
    """
    target = root / name
    try:
        step("link", target)
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise _failed(error, "link", target) from error
    sync_folder(target.parent)
    return True


def replace_file(source: Path, target: Path) -> None:
    """Move a finished file over another one of the same disk, durably. Raises: StorageFailed: `target` is unchanged."""
    with _call("rename", target):
        os.rename(source, target)
    sync_folder(target.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append one line to a log (a run's metrics), without fsync: `sync_file` makes it durable at a checkpoint.

    Raises: DiskFull, StorageFailed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with _call("append", path, len(line)), _opened(path, flags) as descriptor:
        _write_all(descriptor, [line])


def truncate(path: Path, size: int) -> None:
    """Cut a log back to its first `size` bytes; a missing one is fine. Raises: StorageFailed."""
    with _call("truncate", path), contextlib.suppress(FileNotFoundError):
        os.truncate(path, size)


def sync_file(path: Path) -> int:
    """fsync an existing file and return its size in bytes. Raises: StorageFailed."""
    with _call("fsync", path), _opened(path, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size


def rename_dir(source: Path, target: Path) -> None:
    """Rename a folder durably: both parents are synced. Raises: StorageFailed."""
    with _call("rename", target):
        os.rename(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def remove_file(path: Path) -> None:
    """Delete one file; a missing one is fine. Raises: StorageFailed."""
    with _call("unlink", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_tree(folder: Path) -> None:
    """Delete a folder with everything in it, or the file or link in its place; nothing is followed.

    A missing one is fine. Raises: StorageFailed.
    """
    with _call("remove-tree", folder), contextlib.suppress(FileNotFoundError):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            os.unlink(folder)


@contextlib.contextmanager
def lock(path: Path, holder: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold `flock` on a lock file; the kernel frees it when the process dies, however it dies.

    Args:
        path: the lock file, made when missing; its text only feeds the message.
        holder: what this process is doing, written into the file of an exclusive lock.
        shared: many holders at once, excluding an exclusive one.
        wait: sleep until it is free, instead of raising StoreLocked; for short sections only.

    Raises: StoreLocked: somebody else holds it, named from the file's text. StorageFailed.
    """
    with _call("lock", path):
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            held_by = _holder_of(descriptor)
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise StoreLocked(f"held by {held_by}", where=str(path), do="wait for it, or stop it") from error
    _held.add(descriptor)
    try:
        if not shared:
            _sign(descriptor, holder)
        yield
    finally:
        if descriptor in _held:  # a forked child has closed it already, and must not free its parent's lock
            _held.discard(descriptor)
            if not shared:
                _sign(descriptor, "")
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # at once, even if a child forked just now still has a copy open
            os.close(descriptor)


def _sign(descriptor: int, holder: str) -> None:
    """Write who holds a lock into its file, where that is possible.

    The text only feeds a message, and on a full disk nobody must be kept from removing a store to make space.
    """
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)


def _open_lock(path: Path) -> int:
    for _ in range(10):  # the folder of claims is swept when a store is sealed, perhaps just between these two lines
        make_dir(path.parent)
        with contextlib.suppress(FileNotFoundError):
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(path.name, flags, 0o644, dir_fd=folder)
            finally:
                os.close(folder)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "not a regular file")
            return descriptor
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _holder_of(descriptor: int) -> str:
    """Return who holds a lock: what the file says when its process is the holder, else the pids the kernel lists."""
    text, status = os.pread(descriptor, 200, 0).decode(errors="replace").strip(), os.fstat(descriptor)
    inode = status.st_ino
    if text:
        text += f" since {datetime.fromtimestamp(status.st_mtime, UTC):%Y-%m-%d %H:%M:%S} UTC"
    try:
        listed = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:  # not Linux: the text is all there is
        return text or "another process"
    pids = [fields[-4] for fields in listed if "FLOCK" in fields and fields[-3].endswith(f":{inode}")]
    named = [text if f"pid {pid}" in text else f"a process, pid {pid}" for pid in pids]
    return ", ".join(dict.fromkeys(named)) or text or "another process"


def _forget_locks() -> None:
    """Close inherited lock descriptors in a forked child: otherwise a living child keeps a dead parent's lock."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)
