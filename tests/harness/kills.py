"""Kill -9 at every step of a job, and again at steps of its recovery: fault matrix rows 1 and 16.

A job is any callable that works in a home folder; `JOBS` holds them by name, and a new one is one entry.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.catalog import digests_in, list_stores, remove_store
from actstore.layout import StorePaths
from harness import jobs, report, toy
from harness.process import copy_home, count_steps, kill_at

Run = Callable[[Path], None]
Check = Callable[[Path, list[Any], toy.Expected], list[str]]
Finish = Callable[[Path, Run, list[Any], toy.Expected], list[str]]


def capture_survives(home: Path, reported: list[Any], expected: toy.Expected) -> list[str]:
    """After a kill: what was reported committed is there with the same bytes, and no third state opens."""
    return toy.lost(home, reported, expected) + toy.states(home, expected)


def removal_survives(home: Path, reported: list[Any], expected: toy.Expected) -> list[str]:
    """After a kill: the store is whole under its name (sealed or not), or gone from the listing; never half of one."""
    bad = toy.states(home, expected)
    for line in list_stores(home / "stores"):
        groups = range(line.committed) if not line.sealed else {g for d, g in expected.files if d == line.digest}
        bad += toy.lost(home, [(line.digest, g) for g in groups], expected)
    return bad


@dataclass(frozen=True)
class Job:
    """Something that may be killed anywhere.

    Args:
        run: the job; repeating it after a kill must finish it.
        prepare: makes the home it starts from.
        reference: what an uninterrupted run of the capture gives, to compare with.
        survives: what is wrong in a home after a kill, given what was reported before.
        finished: repeats the job to its end and returns what is wrong then.
    """

    run: Run
    prepare: Run
    reference: Run
    survives: Check
    finished: Finish


def _capture_job(run: Run) -> Job:
    return Job(run, lambda home: home.mkdir(), run, capture_survives, toy.finished)


def remove_all(home: Path) -> None:
    """Remove every store of a home, and what an interrupted removal left."""
    stores = home / "stores"
    for digest in {*digests_in(stores), *digests_in(stores / ".staging"), *digests_in(stores / ".trash")}:
        remove_store(digest, stores)


def unseal(home: Path) -> None:
    """Make a capture that stopped before its seal."""
    toy.one_store(home)
    for digest in digests_in(home / "stores"):
        paths = StorePaths(home / "stores", digest)
        paths.sealed.rename(paths.staging)
        (paths.staging / "manifest.json").unlink()


def _finish_removal(home: Path, run: Run, reported: list[Any], expected: toy.Expected) -> list[str]:
    run(home)
    stores = home / "stores"
    bad = [f"left over: {path}" for path in stores.rglob("*") if path.is_file() and path.suffix != ".lock"]
    toy.one_store(home)  # and the same capture can be made again
    return bad + toy.states(home, expected)


def _removal_job(prepare: Run) -> Job:
    return Job(remove_all, prepare, toy.one_store, removal_survives, _finish_removal)


JOBS: dict[str, Job] = {
    "capture": _capture_job(toy.one_store),
    "capture of two hook points": _capture_job(toy.two_stores),
    "remove a sealed store": _removal_job(toy.one_store),
    "remove an unsealed store": _removal_job(unseal),
    "capture that shares row groups": Job(jobs.grown, jobs.short, jobs.both, capture_survives, toy.finished),
    "capture as one of two workers": _capture_job(jobs.worker),
    "repair": Job(jobs.mend, jobs.damaged, toy.one_store, jobs.repair_survives, jobs.repair_finished),
    "garbage collection": Job(jobs.sweep, jobs.littered, toy.one_store, jobs.sweep_survives, jobs.sweep_finished),
}


def inside_trees() -> None:
    """Announce each deletion inside `durable.remove_tree` too: a kill between two of them is a state of its own."""
    unlink, rmdir = os.unlink, os.rmdir

    def announced(call: Any, name: str) -> Any:
        def made(path: Any, *, dir_fd: int | None = None) -> None:
            if dir_fd is not None:  # only shutil.rmtree deletes relative to a folder
                durable.step(name, Path(os.fsdecode(path)))
            call(path, dir_fd=dir_fd)

        return made

    os.unlink, os.rmdir = announced(unlink, "unlink"), announced(rmdir, "rmdir")


@dataclass
class Sweep:
    """The kills of one job."""

    job: Job
    expected: toy.Expected
    folder: Path
    link: bool = True
    early: bool = False
    killed: int = 0
    recovered: set[str] = field(default_factory=set)  # what homes held that were recovered from

    def killed_at(self, step: int, home: Path, before: list[Any] | None = None) -> tuple[bool, list[Any], list[str]]:
        """Kill the job at a step in a home; return (whether it was, all that was reported so far, what is wrong)."""

        def work(tell: Callable[[Any], None]) -> None:
            with toy.commits_reported(tell, early=self.early):
                self.job.run(home)

        killed, reported = kill_at(step, work)
        self.killed += killed
        reported = [*(before or []), *reported]
        return killed, reported, self.job.survives(home, reported, self.expected)

    def one(self, step: int, recoveries: int, rng: random.Random) -> list[str]:
        """Kill at `step`; recover; then kill the recovery at some of its steps, and recover from each.

        After a second kill the recovery is left out when it was already made from a home with the same content.

        Returns: what went wrong, each with where it was killed.
        """
        first, again = self.folder / "first", self.folder / "again"
        for home in (first, again):
            shutil.rmtree(home, ignore_errors=True)
        copy_home(self.folder / "start", first, link=self.link)
        killed, reported, bad = self.killed_at(step, first)
        if not killed:
            return [f"step {step} was not reached"]
        copy_home(first, again, link=self.link)
        steps: list[int] = []

        def counted(home: Path) -> None:
            steps.append(count_steps(lambda: self.job.run(home)))

        bad += self.job.finished(again, counted, reported, self.expected)
        bad = [f"killed at step {step}: {b}" for b in bad]
        for second in _spread(sum(steps), recoveries, rng):
            shutil.rmtree(again, ignore_errors=True)
            copy_home(first, again, link=self.link)
            killed, both, wrong = self.killed_at(second, again, reported)
            wrong += [] if killed else ["the recovery was not killed"]
            state = f"{len(both)} {toy.fingerprint(again)}"
            if state not in self.recovered:  # the same bytes under the same names recover in the same way
                self.recovered.add(state)
                wrong += self.job.finished(again, self.job.run, both, self.expected)
            bad += [f"killed at step {step}, then at {second}: {b}" for b in wrong]
        return bad


def _spread(steps: int, count: int, rng: random.Random) -> list[int]:
    """Return `count` different steps of [0, steps), one from each of as many equal stretches."""
    if count >= steps or count == 0:
        return list(range(steps if count else 0))
    edges = [i * steps // count for i in range(count + 1)]
    return [rng.randrange(low, high) for low, high in itertools.pairwise(edges)]


def sweep(
    job: Job, folder: Path, n: int, rng: random.Random, *, link: bool = True, early: bool = False
) -> tuple[Sweep, int, list[str]]:
    """Kill one job about `n` times: at every step of its first run, and at steps of the recovery from each (n = 0: none).

    Returns: (the kills, steps of an uninterrupted run, what went wrong).
    """
    job.reference(folder / "reference")
    expected = toy.expected_of(folder / "reference")
    job.prepare(folder / "start")
    copy_home(folder / "start", folder / "count", link=False)
    steps = count_steps(lambda: job.run(folder / "count"))
    run = Sweep(job, expected, folder, link, early)
    n = n or steps
    if n < steps:
        return _all(run, [(step, 0) for step in _spread(steps, n, rng)], rng, steps)
    each, rest = divmod(n - steps, steps)
    return _all(run, [(step, each + (step < rest)) for step in range(steps)], rng, steps)


def _all(run: Sweep, plan: list[tuple[int, int]], rng: random.Random, steps: int) -> tuple[Sweep, int, list[str]]:
    bad: list[str] = []
    for step, recoveries in plan:
        bad += run.one(step, recoveries, rng)
    return run, steps, bad


def careless_publication() -> None:
    """The control: bring a store to its final name file by file, as other libraries write theirs."""

    def rename_dir(source: Path, target: Path) -> None:
        for path in sorted(source.rglob("*")):
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                durable.step("write", target / path.relative_to(source))
                shutil.copy(path, target / path.relative_to(source))
        shutil.rmtree(source)

    durable.rename_dir = rename_dir


def run(n: int, seed: int = 0) -> report.Result:
    """Kill every job of `JOBS`, about `n` times in all; most of them fall on the captures."""
    result = report.Result("kills", "SIGKILL at every step of a first run and of its recovery")
    toy.start()
    inside_trees()
    with report.timed(result):
        weights = {name: 14 if name == "capture" else 1 if "two" in name else 3 for name in JOBS}
        for name, job in JOBS.items():
            with report.scratch("kills") as folder:
                share = n * weights[name] // sum(weights.values()) + 1
                kills, steps, bad = sweep(job, folder, share, random.Random(f"{seed} {name}"))
                result.n += kills.killed
                result.details[name] = {"steps": steps, "killed": kills.killed, "different second states": len(kills.recovered)}
                result.bad += [f"{name}: {b}" for b in bad]
        result.controls["reported before it is written"] = _control(seed, 50, early=True)
        careful = durable.rename_dir
        careless_publication()
        try:
            result.controls["published file by file"] = _control(seed, 60, link=False)
        finally:
            durable.rename_dir = careful
    return result


def _control(seed: int, n: int, **options: bool) -> dict[str, int]:
    with report.scratch("kills") as folder:
        kills, _, bad = sweep(JOBS["capture"], folder, n, random.Random(seed), **options)
    return {"n": kills.killed, "bad": len({b.split(":")[0] for b in bad})}


if __name__ == "__main__":
    report.main(run, 2000)
