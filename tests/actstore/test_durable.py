"""The write primitive: killed at every step, failing at every step; with controls that show the tests can fail."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from actstore import durable
from actstore.errors import DiskFull, FormatError, StorageFailed, StoreLocked
from actstore.files import read_bounded


def steps_of(job) -> list[str]:
    names: list[str] = []
    durable.step_hook = lambda name, path: names.append(name)
    job()
    durable.step_hook = None
    return names


def kill_at(n: int, job) -> None:
    """Run `job` in a child that kills itself at its n-th step."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        count = 0

        def hook(name: str, path: Path) -> None:
            nonlocal count
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        durable.step_hook = hook
        try:
            job()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_a_file_is_synced_before_its_rename_and_its_folder_after(tmp_path):
    (tmp_path / "tmp").mkdir()
    names = steps_of(lambda: durable.write_new(tmp_path, "a", [b"x"]))
    assert names == ["open", "write", "fsync", "close", "rename", "fsync-folder"]


def test_killed_at_every_step_a_file_is_whole_or_absent(tmp_path):
    content = [b"hello", memoryview(b" world")]
    n = len(steps_of(lambda: durable.write_new(tmp_path, "first", content)))
    for i in range(n):
        kill_at(i, lambda i=i: durable.write_new(tmp_path, f"file{i}", content))
        target = tmp_path / f"file{i}"
        assert not target.exists() or target.read_bytes() == b"hello world"
        durable.write_new(tmp_path, f"file{i}", content, replace=True)
        assert target.read_bytes() == b"hello world"


def test_control_a_direct_write_is_torn_by_the_same_kill(tmp_path):
    """Without temp file and rename the same harness sees a torn file: the test above can fail."""

    def careless() -> None:
        with open(tmp_path / "torn", "wb", buffering=0) as file:
            file.write(b"hello")
            durable.step("between", tmp_path)
            file.write(b" world")

    kill_at(0, careless)
    assert (tmp_path / "torn").read_bytes() == b"hello"


@pytest.mark.parametrize("code, error", [(errno.EIO, StorageFailed), (errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull)])
def test_a_failing_call_at_every_step_names_itself_and_leaves_no_temporary_file(tmp_path, code, error):
    (tmp_path / "tmp").mkdir()
    n = len(steps_of(lambda: durable.write_new(tmp_path, "first", [b"x"])))
    for i in range(n):
        count = iter(range(100))

        def hook(name: str, path: Path, i: int = i, count=count) -> None:
            if next(count) == i:
                raise OSError(code, os.strerror(code))

        durable.step_hook = hook
        with pytest.raises(error) as caught:
            durable.write_new(tmp_path, f"file{i}", [b"x"])
        durable.step_hook = None
        assert caught.value.where and not list((tmp_path / "tmp").iterdir())


def test_a_committed_file_is_never_overwritten(tmp_path):
    durable.write_new(tmp_path, "a", [b"first"])
    with pytest.raises(StorageFailed, match="overwrite"):
        durable.write_new(tmp_path, "a", [b"second"])
    assert (tmp_path / "a").read_bytes() == b"first"


def test_reading_refuses_links_fifos_folders_and_large_files(tmp_path):
    (tmp_path / "target").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("link", "fifo", "folder"):
        with pytest.raises(FormatError, match="regular"):
            read_bounded(tmp_path, name, 100)
    with pytest.raises(FormatError, match="at most 3"):
        read_bounded(tmp_path, "target", 3)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path, "absent", 3)


def test_an_exclusive_lock_refuses_others_by_name_and_is_freed_by_death(tmp_path):
    path = tmp_path / "x.lock"
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with durable.lock(path, f"the child, pid {os.getpid()}"):
            os.write(write_end, b"1")
            signal.pause()
    os.read(read_end, 1)
    with pytest.raises(StoreLocked, match="the child"), durable.lock(path, "me"):
        pass
    with pytest.raises(StoreLocked), durable.lock(path, "me", shared=True):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with durable.lock(path, "me"):
        pass


def test_a_forked_child_does_not_keep_its_dead_parents_lock(tmp_path):
    path = tmp_path / "x.lock"
    with durable.lock(path, "parent"):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            signal.pause()
    with durable.lock(path, "next"):  # the child lives, but closed its copy of the descriptor
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_reader_is_named_by_its_pid_not_by_a_dead_writers_text(tmp_path):
    (tmp_path / "x").write_text("a capture, pid 999999 on elsewhere")
    with (
        durable.lock(tmp_path / "x", "", shared=True),
        pytest.raises(StoreLocked, match=f"pid {os.getpid()}") as caught,
        durable.lock(tmp_path / "x", "me"),
    ):
        pass
    assert "999999" not in str(caught.value)


def test_readers_share_a_lock(tmp_path):
    with durable.lock(tmp_path / "x", "", shared=True), durable.lock(tmp_path / "x", "", shared=True):
        pass


def test_a_link_that_fails_for_another_reason_than_the_file_system_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(StorageFailed, match="link"):
        durable.link(tmp_path / "a", tmp_path / "no folder", "a")


def test_a_lock_that_cannot_be_made_or_taken_is_an_error_and_leaves_nothing_open(tmp_path, monkeypatch):
    with pytest.raises(StorageFailed), durable.lock(Path("/proc/self/x.lock"), "a test"):
        raise AssertionError("locked where no file can be made")

    def fails(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fails)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageFailed, match="lock"), durable.lock(tmp_path / "x.lock", "a test"):
        raise AssertionError("locked without a lock")
    assert set(os.listdir("/proc/self/fd")) == before


def test_where_the_kernel_lists_no_locks_the_file_names_the_holder(tmp_path, monkeypatch):
    with durable.lock(tmp_path / "x.lock", "a careful test"):
        monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
        with pytest.raises(StoreLocked, match="a careful test"), durable.lock(tmp_path / "x.lock", "another"):
            raise AssertionError("locked twice")


def test_a_lock_is_neither_a_pipe_nor_behind_a_link(tmp_path):
    """A folder of locks that is a link would let a capture write into whatever file has a lock's name elsewhere."""
    os.mkfifo(tmp_path / "pipe")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.lock").write_text("precious")
    (tmp_path / "locks").symlink_to(elsewhere)
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path / "pipe", tmp_path / "locks" / "x.lock"):
        with pytest.raises(StorageFailed, match="lock failed"), durable.lock(path, "me"):
            raise AssertionError
    assert (elsewhere / "x.lock").read_text() == "precious" and os.listdir("/proc/self/fd") == before
