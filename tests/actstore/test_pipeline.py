"""The writer's thread and the claims: nothing hangs, nothing is freed too early, whoever fails or is interrupted."""

from __future__ import annotations

import errno
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actstore import durable, pipeline
from actstore.capture import Progress, StoppedError, capture
from actstore.catalog import open_store
from actstore.check import check_store
from actstore.errors import DiskFull
from actstore.pipeline import write_behind
from actstore.timeline import Timeline
from actstore.writer import StoreWriter


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


def behind():
    return write_behind(Timeline(), lambda: None)


def test_jobs_run_in_order_in_another_thread_and_all_before_the_end():
    seen = []
    with behind() as queue:
        for i in range(20):
            queue.put(lambda timeline, i=i: seen.append((i, threading.current_thread().name)))
    assert seen == [(i, "actstore-writer") for i in range(20)]


def test_a_failed_job_is_raised_by_the_next_check_and_those_behind_it_are_not_run():
    seen = []

    def fail(timeline):
        raise OSError("full")

    with pytest.raises(OSError, match="full"), behind() as queue:
        queue.put(fail)
        queue.put(seen.append)
        for _ in range(1000):
            queue.check()
            time.sleep(0.005)
    assert not seen


def test_interrupted_twice_while_a_job_writes_the_end_still_waits_for_it():
    """Locks are freed after the block: if it ended before the job, another process could write the same row group."""
    ended = []

    def slow(timeline):
        for _ in range(2):
            time.sleep(0.2)
            signal.raise_signal(signal.SIGINT)  # arrives in the main thread, which is waiting
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), behind() as queue:
        queue.put(slow)
    assert ended


def two_workers(request) -> list[BaseException | None]:
    """Run both workers of a capture in threads: locks of one process exclude each other as those of two do."""
    with ThreadPoolExecutor(2) as pool:
        return [f.exception(timeout=60) for f in [pool.submit(capture, request(workers=2, rank=i)) for i in range(2)]]


def test_two_workers_whose_disks_are_full_both_say_so_and_neither_waits(toy_request, monkeypatch):
    """Each holds a claim, fails to write, and must not wait for the other's row group for ever."""
    both_claimed = threading.Event()
    one_each = threading.Barrier(2, action=both_claimed.set, timeout=30)
    real = StoreWriter.try_claim

    def claim(writer, index):
        claimed = real(writer, index)
        if claimed is not None and not both_claimed.is_set():  # one may later claim what the other has given up
            one_each.wait()
        return claimed

    monkeypatch.setattr(StoreWriter, "try_claim", claim)

    def full(name: str, path: Path) -> None:
        if name == "write" and both_claimed.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")

    durable.step_hook = full
    assert [type(error) for error in two_workers(lambda **k: toy_request(rows=2048, **k))] == [DiskFull, DiskFull]


def test_a_claim_is_freed_when_sharing_fails_so_that_the_next_attempt_does_not_wait(toy_request):
    capture(toy_request(rows=2100))

    def full(name: str, path: Path) -> None:
        if name == "link":
            raise OSError(errno.ENOSPC, "No space left on device")

    durable.step_hook = full
    with pytest.raises(DiskFull) as kept:  # what it refers to stays alive, and with it a claim that was not freed
        capture(toy_request(rows=3500))
    durable.step_hook = None
    with ThreadPoolExecutor(1) as pool:
        (digest,) = pool.submit(capture, toy_request(rows=3500)).result(timeout=30)
    assert digest and kept


def test_a_row_group_that_is_committed_just_before_it_is_claimed_is_not_computed_again(toy_request, monkeypatch):
    """Another worker commits it between the look at its record and the lock."""
    written, real, asked = [], pipeline.put_rows, iter([False, True])
    monkeypatch.setattr(pipeline, "put_rows", lambda writer, index, *rows: written.append(index) or real(writer, index, *rows))
    request = toy_request(rows=2048, workers=2)

    def other_first(name: str, path: Path) -> None:
        if name == "lock" and path.name == "0.lock":
            durable.step_hook = None
            with pytest.raises(StoppedError):
                capture(request, Progress(stop=lambda: next(asked)))
            assert written == [0]

    durable.step_hook = other_first
    (digest,) = capture(request)
    assert written == [0, 1] and not check_store(open_store(digest, request.stores).path, data=True).findings


def test_a_worker_may_seal_while_the_one_that_committed_last_still_syncs(toy_request, monkeypatch):
    """The record has its name, so the other sees a complete store; then the folder to be synced is gone. Not an error."""
    sealed = threading.Event()
    real = pipeline.put_rows

    def late(writer, index, *arrays):
        real(writer, index, *arrays)
        if index == 0 and not sealed.is_set():
            other = threading.Thread(target=lambda: (capture(toy_request(rows=1024, workers=2, rank=1)), sealed.set()))
            other.start()
            other.join(30)
            durable.sync_folder(writer.paths.staging / "row_groups")  # what comes after the rename of the record

    monkeypatch.setattr(pipeline, "put_rows", late)
    (digest,) = capture(toy_request(rows=1024, workers=2, rank=0))
    store = open_store(digest, toy_request().stores)
    assert sealed.is_set() and not check_store(store.path, data=True).findings


def test_control_the_sync_after_a_seal_is_an_error_while_the_store_is_not_sealed(toy_request, monkeypatch):
    real = pipeline.put_rows

    def unlucky(writer, index, *arrays):
        real(writer, index, *arrays)
        durable.sync_folder(writer.paths.staging / "no such folder")

    monkeypatch.setattr(pipeline, "put_rows", unlucky)
    with pytest.raises(durable.StorageFailed, match="fsync-folder"):
        capture(toy_request(rows=1024))
