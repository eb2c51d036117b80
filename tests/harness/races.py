"""Several processes at one store at the same moment: who is let in, who does what, and what a reader sees meanwhile.

Fault matrix rows 13 and 14, and the restated promise 6: one writer a row group.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore import durable, fill
from actstore.capture import capture
from actstore.catalog import list_stores, open_store
from actstore.errors import ActstoreError, StoreNotFound, StoreNotSealed
from harness import report, toy

Works = list[Callable[[Callable[[Any], None]], None]]
CHILD_SECONDS = 60


def together(works: Works, watch: Callable[[], None] = lambda: None) -> list[tuple[int, list[Any]]]:
    """Run each work in a child of its own, all started at the same moment, while this process runs `watch`.

    Returns: each child's wait status and what it reported, in order.
    """
    gate, opened = os.pipe()
    children = []
    for work in works:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(opened)
            _child(work, gate, write_end)
        os.close(write_end)
        children.append((child, read_end))
    os.close(gate)
    os.close(opened)  # all children wake here
    watch()
    found = []
    for child, read_end in children:
        with os.fdopen(read_end, "rb") as pipe:
            lines = pipe.read().splitlines()
        found.append((os.waitpid(child, 0)[1], [json.loads(line) for line in lines]))
    return found


def _child(work: Callable[[Callable[[Any], None]], None], gate: int, write_end: int) -> None:
    signal.alarm(CHILD_SECONDS)

    def tell(value: Any) -> None:
        os.write(write_end, json.dumps(value).encode() + b"\n")

    try:
        os.read(gate, 1)
        work(tell)
        tell("done")
    except ActstoreError as error:
        tell(type(error).__name__)
    except BaseException:  # noqa: BLE001 - told to the parent
        tell(traceback.format_exc()[-1000:])
    finally:
        os._exit(0)


def _captures(home: Path, workers: int, processes: int, kill: tuple[int, int] | None = None) -> Works:
    """Return the captures of one round; `kill` is (process, step) of one that is killed."""

    def work(tell: Callable[[Any], None], rank: int) -> None:
        request = dataclasses.replace(toy.request(home), workers=workers, rank=rank % workers)
        if kill is not None and kill[0] == rank:
            count = itertools.count()
            durable.step_hook = lambda name, path: (next(count) == kill[1] and os.kill(os.getpid(), signal.SIGKILL)) or None
        with toy.commits_reported(tell):
            capture(request)

    return [lambda tell, rank=rank: work(tell, rank) for rank in range(processes)]  # type: ignore[misc]


def _round(home: Path, expected: toy.Expected, workers: int, processes: int, kill: tuple[int, int] | None) -> list[str]:
    """Run one race and return what is wrong with it."""
    toy.request(home)  # writes the corpus
    ended = together(_captures(home, workers, processes, kill))
    commits = collections.Counter(tuple(value) for _, told in ended for value in told if isinstance(value, list))
    bad = [f"row group {group} was committed {n} times" for (_, group), n in commits.items() if n > 1]
    allowed = {"done"} if workers > 1 else {"done", "StoreLocked"}
    for rank, (status, told) in enumerate(ended):
        killed = os.WIFSIGNALED(status)
        last = told[-1] if told and isinstance(told[-1], str) else ""
        if killed and (kill is None or kill[0] != rank):
            bad.append(f"process {rank} died")
        elif not killed and last not in allowed:
            bad.append(f"process {rank} ended in {last}")
    if not any(told and told[-1] == "done" for _, told in ended):
        bad.append("nobody finished")
    if workers > 1 or not bad:
        bad += toy.states(home, expected) + toy.lost(home, [list(c) for c in commits], expected)
        bad += [] if {x.digest for x in list_stores(home / "stores") if x.sealed} == set(expected.content) else ["not sealed"]
    return bad


def no_locks() -> None:
    """The control: locks are made and hold nobody off."""

    @contextlib.contextmanager
    def lock(path: Path, holder: str, *, shared: bool = False, wait: bool = False) -> Any:
        yield

    durable.lock = lock  # type: ignore[assignment]


def _watched(home: Path, expected: toy.Expected) -> tuple[int, list[str]]:
    """Open the store again and again while it is captured; return (looks, what was seen that must not be)."""
    bad: list[str] = []
    looks = 0
    (digest,) = expected.content

    def watch() -> None:
        nonlocal looks
        while True:
            looks += 1
            try:
                store = open_store(digest, home / "stores")
            except (StoreNotFound, StoreNotSealed):
                continue
            if store.content_digest != expected.content[digest] or len(store[:]) != store.rows:
                bad.append("a reader saw another store")
            return

    toy.request(home)
    together(_captures(home, 1, 1), watch)
    return looks, bad


def run(n: int, seed: int = 0) -> report.Result:
    """Run `n` races (a third of plain captures, the rest of workers, one of which is killed), and n / 2 watched captures."""
    result = report.Result("races", "three captures of one store started at once; readers that look while it is written")
    toy.start()
    fill.WAIT_SECONDS = 0.01
    rng = random.Random(seed)
    looks = 0
    with report.timed(result), report.scratch("races") as folder:
        toy.one_store(folder / "reference")
        expected = toy.expected_of(folder / "reference")
        for i in range(n):
            workers = 1 if i % 3 == 0 else 3
            kill = (rng.randrange(3), rng.randrange(120)) if i % 3 == 2 else None
            result.bad += [f"race {i}: {b}" for b in _round(folder / f"race{i}", expected, workers, 3, kill)]
        result.n = n
        for i in range(n // 2):
            seen, bad = _watched(folder / f"watched{i}", expected)
            looks += seen
            result.bad += [f"watched capture {i}: {b}" for b in bad]
        result.details = {"watched captures": n // 2, "looks of readers": looks}
        locked = durable.lock
        no_locks()
        try:
            for workers in (1, 3):
                bad = [bool(_round(folder / f"control{workers}-{i}", expected, workers, 3, None)) for i in range(10)]
                result.controls[f"locks off, {'plain captures' if workers == 1 else 'workers'}"] = {"n": 10, "bad": sum(bad)}
        finally:
            durable.lock = locked
    return result


if __name__ == "__main__":
    report.main(run, 200)
