"""Promise 6, restated: one writer a row group.

A plain capture holds its store alone and a second one is refused at once. Captures that were told of each other
(`--workers`, or RANK and WORLD_SIZE) share a store: each row group is claimed by one of them before it is computed, a
dead one's claims are free at once, whoever finds all row groups there seals, once. Readers never wait and never see
half a store.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.promise import holds
from helpers import ROOT, TINY, words, write_jsonl

from actstore import durable, fill
from actstore.capture import Progress, capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.errors import StoreLocked, UsageError


def test_races_of_captures_of_workers_and_of_readers():
    """200 races (faults 13 and 14); the control is the same without locks."""
    result = holds("races", 200)
    assert result["n"] == 200 and result["details"]["watched captures"] == 100


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


def test_a_second_plain_capture_is_refused_at_once_and_a_worker_too(toy_request, small_groups):
    request, seen = toy_request(), []

    def look(rows: int) -> None:
        if not seen:
            for other in (request, dataclasses.replace(request, workers=2)):
                with pytest.raises(StoreLocked, match=f"pid {os.getpid()}"):
                    capture(other)
                seen.append(other)

    capture(request, Progress(on_rows=look))
    assert len(seen) == 2


def test_workers_divide_the_row_groups_and_both_say_the_digest(toy_request, small_groups, monkeypatch):
    """Two captures in two processes; together they compute each row exactly once."""
    monkeypatch.setattr(fill, "WAIT_SECONDS", 0.01)
    first, second = (toy_request(workers=2, rank=rank) for rank in (0, 1))
    told: list[str] = []
    computed = {0: 0, 1: 0}

    def helped(rows: int) -> None:
        computed[0] += rows
        if not told:  # the second worker comes when the first is at work, and finishes what is left
            told.extend(capture(second, Progress(on_rows=lambda n: computed.__setitem__(1, computed[1] + n))) if False else [""])

    digests = capture(first, Progress(on_rows=helped))
    store = open_store(digests[0], first.stores)
    assert computed[0] == store.rows and capture(second) == digests
    assert not check_store(store.path, data=True).findings


@pytest.mark.parametrize("workers, rank", [(0, 0), (2, 2), (2, -1), (5000, 0)])
def test_ranks_that_cannot_be_are_refused(toy_request, workers, rank):
    with pytest.raises(UsageError, match="rank"):
        toy_request(workers=workers, rank=rank)


def test_a_lock_of_a_claim_is_free_when_its_process_dies(tmp_path):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with durable.lock(tmp_path / "0.lock", "the child"):
            os.write(write_end, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read_end, 1)
    with pytest.raises(StoreLocked), durable.lock(tmp_path / "0.lock", "me"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with durable.lock(tmp_path / "0.lock", "me"):
        pass


def worker(stores: Path, corpus: Path, rank: int, size: int) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "actstore"), "capture", "--model", str(TINY), "--corpus", str(corpus)]
    command += ["--hook", "blocks.1.hook_resid_pre", "--stores", str(stores), "--batch-tokens", "256"]
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_real_workers_one_killed_the_other_finishes_and_seals(tmp_path):
    """RANK=0 WORLD_SIZE=2 actstore capture … beside RANK=1; one is killed as soon as it has committed something."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", words(1500, 60))
    stores = tmp_path / "stores"
    processes = [worker(stores, corpus, rank, 2) for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(x.committed for x in list_stores(stores)):
        time.sleep(0.05)
    assert list_stores(stores)[0].committed, [p.stderr.read() for p in processes if p.poll() is not None]
    processes[1].kill()
    out, err = processes[0].communicate(timeout=240)
    processes[1].communicate()
    assert processes[0].returncode == 0, err
    store = open_store(out.strip(), stores)
    assert not check_store(store.path, data=True).findings
    again = worker(stores, corpus, 1, 2)  # a late one finds it done
    assert again.communicate(timeout=60)[0].strip() == store.digest and again.returncode == 0
