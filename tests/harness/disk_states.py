"""Every state a disk may be in after a power loss, made real and recovered from: fault matrix row 3, by enumeration."""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.errors import ActstoreError
from harness import kills, report, toy
from harness.disk import Disk, Recorder, Tree, load, losses

SUBSETS = 32  # of pending changes at one point in time; more are sampled


def record(
    run: Callable[[Path], None], home: Path, rng: random.Random, *, fsync: bool = True, fsync_folder: bool = True
) -> Iterator[tuple[Tree, list[Any]]]:
    """Run a job on a real folder and yield (what a power loss may leave of its stores, what was reported committed).

    The states of every moment between two calls come out, many of them several times.
    """
    stores = home / "stores"
    stores.mkdir(exist_ok=True)
    disk = Disk(fsync, fsync_folder, load(stores))
    recorder, reported, found = Recorder(disk, stores), [], []

    def hook(name: str, path: Path) -> None:
        if name in ("lock", "read") or ".locks" in path.parts or not path.is_relative_to(stores):
            return  # a lock file's content means nothing, and `stores` itself is there from the start
        recorder.hook(name, path)
        found.extend((tree, list(reported)) for tree in losses(disk, SUBSETS, rng))

    durable.step_hook = hook
    try:
        with toy.commits_reported(reported.append):
            run(home)
    finally:
        durable.step_hook = None
    recorder.settle()
    found.extend((tree, list(reported)) for tree in losses(disk, SUBSETS, rng))
    yield from found


@functools.cache
def _digest(name: str, data: bytes) -> str:
    if name == "manifest.json":  # seconds are in it: only whether it is whole counts
        data = b"whole" if toy.is_manifest(data) else data[:100]
    return hashlib.sha256(data).hexdigest()


def key_of(tree: Tree, reported: list[Any]) -> str:
    """Return a digest of a state; temporary files count by content alone, seconds in a manifest not at all."""
    lines = []
    for path, data in tree.items():
        folder, _, name = path.rpartition("/")
        lines.append(f"{folder}/{'*' if folder.endswith('/tmp') else name} {'' if data is None else _digest(name, data)}")
    return hashlib.sha256(repr((sorted(lines), reported)).encode()).hexdigest()


def make_real(tree: Tree, home: Path) -> None:
    """Write a state into an empty home."""
    (home / "stores").mkdir(parents=True)
    for name, data in tree.items():
        if data is None:
            (home / "stores" / name).mkdir()
        else:
            (home / "stores" / name).write_bytes(data)


def judge(job: kills.Job, home: Path, reported: list[Any], expected: toy.Expected) -> list[str]:
    """Return what is wrong with a state: right after the power loss, and after the job was run again."""
    bad = job.survives(home, reported, expected)
    try:
        return bad + job.finished(home, job.run, [] if bad else reported, expected)
    except (ActstoreError, OSError) as error:
        return [*bad, f"the rerun ended in {type(error).__name__}: {error}"]


def explore(job: kills.Job, folder: Path, n: int, rng: random.Random, **model: bool) -> tuple[int, list[str]]:
    """Visit `n` distinct states of a job: those of its first run, then those of its recovery from states found.

    Returns: (states visited, what went wrong).
    """
    job.reference(folder / "reference")
    expected = toy.expected_of(folder / "reference")
    job.prepare(folder / "start")
    first, home = folder / "first", folder / "home"
    shutil.copytree(folder / "start", first)
    seen: set[str] = set()
    starts: list[tuple[Tree, list[Any]]] = []
    bad: list[str] = []
    before: list[Any] = []  # reported before the run that is recorded now
    while len(seen) < n:
        found = list(record(job.run, first, rng, **model))
        rng.shuffle(found)
        for tree, reported in found:
            known = key_of(tree, [*before, *reported])
            if known in seen or len(seen) >= n:
                continue
            seen.add(known)
            shutil.rmtree(home, ignore_errors=True)
            make_real(tree, home)
            wrong = judge(job, home, [*before, *reported], expected)
            bad += [f"state {len(seen)}: {w}" for w in wrong]
            if not wrong:
                starts.append((tree, [*before, *reported]))
        if not starts:
            break
        tree, before = starts.pop(rng.randrange(len(starts)))  # the recovery from this state is next
        shutil.rmtree(first)
        make_real(tree, first)
    return len(seen), bad


def run(n: int, seed: int = 0) -> report.Result:
    """Visit `n` distinct disk states of captures and removals, and of controls without fsync."""
    result = report.Result("disk states", "a distinct disk state after a power loss, modelled, made real and recovered from")
    toy.start()
    with report.timed(result):
        shares = {"capture": 6, "capture of two hook points": 2, "remove a sealed store": 1}
        for name, share in shares.items():
            with report.scratch("disk") as folder:
                wanted = -(-n * share // sum(shares.values()))
                visited, bad = explore(kills.JOBS[name], folder, wanted, random.Random(f"{seed} {name}"))
            result.n += visited
            result.details[name] = visited
            result.bad += [f"{name}: {b}" for b in bad]
        for name, model in {"fsync ignored": {"fsync": False}, "folder fsync ignored": {"fsync_folder": False}}.items():
            with report.scratch("disk") as folder:
                visited, bad = explore(kills.JOBS["capture"], folder, 100, random.Random(seed), **model)
            result.controls[name] = {"n": visited, "bad": len({b.split(":")[0] for b in bad})}
    return result


if __name__ == "__main__":
    report.main(run, 2000)
