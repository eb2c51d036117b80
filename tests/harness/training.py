"""A fit killed at every step and resumed: the same bits as without the kill. Fault matrix rows 1 and 36.

This process imports torch but never computes with it: its children do, with one thread, so no thread pool is forked.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a first fit imports late, which would cost seconds in every child.
import torch
import torch._dynamo

import trainer.architectures.topk
import trainer.kernels.cpu
import trainer.member
from actstore import durable
from actstore.catalog import open_store
from harness import report, toy
from harness.process import import_numba, in_child, kill_at
from trainer import FitConfig, FitProgress, fit

FIT: Any = sys.modules["trainer.fit"]  # the module; `trainer.fit` is its function
STEPS = 50
RUN_FILES = ("sae.safetensors", "metrics.jsonl", "config.json", "result.json")
CHECKPOINT_TICKS = 4  # see Ticks


class Ticks:
    """A clock that counts how often it was asked: checkpoints come every few steps, not every few minutes."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def monotonic(self) -> int:
        """Return one more than the time before."""
        return next(self._count)


def job(stores: Path, runs: Path, on_step: Callable[[int, list[dict[str, float]]], None] = lambda rows, latest: None) -> None:
    """Train two SAEs for STEPS steps, one with the compiled kernel, one with the reference; run in a child."""
    torch.set_num_threads(1)
    FIT.time, FIT.CHECKPOINT_SECONDS, FIT.CHECKPOINT_SHARE = Ticks(), CHECKPOINT_TICKS, 1
    config = FitConfig(n_latents=(16,), k=(1, 3), batch_size=29, rows=29 * STEPS - 7, dead_after_rows=200, holdout=0.02)
    (digest,) = toy_digests(stores)
    fit(open_store(digest, stores), config, runs, progress=FitProgress(on_step=on_step))


def toy_digests(stores: Path) -> list[str]:
    """Return the digests of the stores in a folder."""
    return [p.name for p in stores.iterdir() if len(p.name) == 64]


def resumed(stores: Path, runs: Path) -> tuple[dict[str, str], list[str]]:
    """Run the fit to its end in a child; return (digest of every file of every run, what went wrong)."""
    status, told = in_child(lambda tell: job(stores, runs))
    bad = [f"the resumed fit failed: {told}"] if status else []
    found = {
        f"{path.parent.name[:8]}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in runs.glob("?" * 64 + "/*")
        if path.name in RUN_FILES
    }
    return found, bad


def different(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the files that are not bit for bit as expected."""
    return [f"{name} differs" for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def kill_at_step(stores: Path, runs: Path, step: int) -> bool:
    """Kill a fit after its training step number `step`, before that step's checkpoint; return whether it was killed."""

    def work(tell: Any) -> None:
        count = itertools.count(1)
        job(stores, runs, lambda rows, latest: os.kill(os.getpid(), signal.SIGKILL) if next(count) == step else None)

    status, told = in_child(work)
    assert not told, told
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at_calls(stores: Path, folder: Path, expected: dict[str, str], n: int, rng: random.Random) -> tuple[int, list[str]]:
    """Kill the fit at system calls: those of checkpoints and of the finish; return (how often, what was wrong)."""

    def work(tell: Any) -> None:
        job(stores, folder / "count")
        tell(None)

    def counted(tell: Any) -> None:
        count = itertools.count()
        durable.step_hook = lambda name, path: next(count) and None
        job(stores, folder / "count")
        tell(next(count))

    _, (steps,) = in_child(counted)
    bad: list[str] = []
    calls = sorted({*range(steps - 40, steps), *rng.sample(range(steps - 40), max(0, n - 40))}) if n >= 40 else []
    calls = calls or sorted(rng.sample(range(steps), n))
    for call in calls:
        runs = folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        killed, _ = kill_at(call, lambda tell, runs=runs: job(stores, runs))
        found, wrong = resumed(stores, runs)
        wrong += different(expected, found) + ([] if killed else ["it was not killed"])
        bad += [f"killed at call {call}: {w}" for w in wrong]
    return len(calls), bad


def damage_newest(runs: Path, how: str) -> int:
    """Damage the newest checkpoint of every run; return how many runs have two."""
    damaged = 0
    for folder in runs.glob("?" * 64 + "/checkpoints"):
        steps = sorted(int(p.stem) for p in folder.glob("*.json"))
        if len(steps) < 2:
            continue
        path = folder / f"{steps[-1]}{'.json' if how == 'torn record' else '.safetensors'}"
        data = path.read_bytes()
        path.chmod(0o644)
        flipped = data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]
        path.write_bytes(flipped if how == "flipped" else data[: len(data) // 2])
        damaged += 1
    return damaged


def use_damaged(stores: Path, folder: Path, expected: dict[str, str], how: str, step: int) -> list[str]:
    """Kill a fit, damage its newest checkpoints, resume: the one before is used, said aloud, and the end is the same."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    kill_at_step(stores, runs, step)
    if damage_newest(runs, how) != 2:
        return [f"{how}: at step {step} there are not two checkpoints of each run"]
    said: list[str] = []

    def work(tell: Any) -> None:
        torch.set_num_threads(1)
        FIT.time = Ticks()
        (digest,) = toy_digests(stores)
        config = FitConfig(n_latents=(16,), k=(1, 3), batch_size=29, rows=29 * STEPS - 7, dead_after_rows=200, holdout=0.02)
        fit(open_store(digest, stores), config, runs, progress=FitProgress(on_start=lambda about: tell(about)))

    _, told = in_child(work)
    said = [line for about in told for line in about.get("complaints", [])]
    found, bad = resumed(stores, runs)
    bad += different(expected, found)
    if len(said) != 2:
        bad.append(f"{len(said)} damaged checkpoints were said aloud, not 2: {told}")
    return [f"newest checkpoint {how}: {b}" for b in bad]


def run(n: int, seed: int = 0) -> report.Result:
    """Kill a fit at each of its STEPS steps, at `n` - STEPS system calls, and damage its newest checkpoint."""
    result = report.Result(
        "training", "kill -9 at a training step or system call of a fit, resumed; weights and metrics compared"
    )
    import_numba()
    gc.freeze()
    with report.timed(result), report.scratch("training") as folder:
        stores = folder / "home" / "stores"
        status, told = in_child(lambda tell: toy.one_store(folder / "home"))
        assert status == 0, told
        expected, result.bad = resumed(stores, folder / "reference")
        assert len(expected) == 2 * len(RUN_FILES), expected
        for step in range(1, STEPS + 1):
            runs = folder / f"step{step}"
            killed = kill_at_step(stores, runs, step)
            found, bad = resumed(stores, runs)
            bad += different(expected, found) + ([] if killed else ["it was not killed"])
            result.bad += [f"killed at step {step}: {b}" for b in bad]
        calls, bad = kill_at_calls(stores, folder, expected, max(0, n - STEPS), random.Random(seed))
        result.bad += bad
        for how in ("torn", "flipped", "torn record"):
            result.bad += use_damaged(stores, folder, expected, how, 23)
        result.n = STEPS + calls
        result.details = {"steps": STEPS, "calls": calls, "damaged checkpoints": 3}
        result.controls["a moment of Adam forgotten on resume"] = _control(stores, folder, expected)
    return result


def _control(stores: Path, folder: Path, expected: dict[str, str]) -> dict[str, int]:
    """Forget one tensor on resume: the comparison must show it."""

    def work(tell: Any) -> None:
        restore = trainer.member._restore_

        def forgetful(member: Any, tensors: Any, scalars: Any) -> None:
            restore(member, tensors, scalars)
            member.optimizer.state[member.sae.W_enc]["exp_avg_sq"].zero_()

        trainer.member._restore_ = forgetful
        job(stores, folder / "control")

    kill_at_step(stores, folder / "control", 23)
    in_child(work)
    found, _ = resumed(stores, folder / "control")
    return {"n": 1, "bad": int(bool(different(expected, found)))}


if __name__ == "__main__":
    report.main(run, 90)
