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
from harness.promise import kept
from helpers import ROOT, TINY, words, write_jsonl

from actstore import durable, fill, pipeline
from actstore.capture import Plan, Progress, capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.errors import StoreLocked, UsageError


def test_races_of_captures_of_workers_and_of_readers():
    """200 races (faults 13 and 14); the control is the same without locks."""
    result = kept("races", 200)
    assert result["details"]["watched captures"] == 100


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


def test_a_worker_takes_what_another_has_not_claimed_and_waits_for_the_rest(toy_request, small_groups, monkeypatch):
    """The first worker has claimed row group 0 when the second comes, does the others, and waits; then both are done."""
    monkeypatch.setattr(fill, "WAIT_SECONDS", 0.01)
    request = toy_request(workers=2)
    read_end, write_end = os.pipe()
    commits_end, commit_end = os.pipe()
    child = groups = 0

    def plan(plan: Plan) -> None:
        nonlocal groups
        groups = plan.stores[0]["row_groups"]

    def fork_once(rows: int) -> None:
        nonlocal child
        if child == 0:
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                rows_done: list[int] = []
                capture(request, Progress(on_rows=rows_done.append, on_commit=lambda: os.write(commit_end, b".") and None))
                os.write(write_end, f"{sum(rows_done)}".encode())
                os._exit(0)
            for _ in range(groups - 1):  # the second worker commits all others, and then waits for ours
                os.read(commits_end, 1)

    committed: list[int] = []
    put_rows = pipeline.put_rows
    monkeypatch.setattr(pipeline, "put_rows", lambda w, index, *arrays: committed.append(index) or put_rows(w, index, *arrays))
    store = open_store(capture(request, Progress(on_rows=fork_once, on_plan=plan))[0], request.stores)
    assert os.waitpid(child, 0)[1] == 0 and int(os.read(read_end, 20)) == store.rows
    assert committed == [0] and len(store.manifest.groups) > 2
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
    corpus = write_jsonl(tmp_path / "corpus.jsonl", words(900, 60))
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
