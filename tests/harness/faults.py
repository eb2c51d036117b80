"""Every call fails, once and for good, with each errno: fault matrix rows 5 and 6."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.errors import ActstoreError, DiskFull, StorageFailed
from harness import report, toy
from harness.process import count_steps

ERRNOS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
FULL = (errno.ENOSPC, errno.EDQUOT)


def one(home: Path, step: int, code: int, lasting: bool, expected: toy.Expected, *, early: bool = False) -> list[str]:
    """Run a capture whose call number `step` fails (and all after it, if `lasting`); return what is wrong.

    With `early` row groups are reported before they are written: the control.
    """
    shutil.rmtree(home, ignore_errors=True)
    count, reported, failed = itertools.count(), [], []  # type: ignore[var-annotated]

    def hook(name: str, path: Path) -> None:
        at = next(count)
        if at == step or (lasting and at > step):
            failed.append((name, str(path)))
            raise OSError(code, os.strerror(code))

    durable.step_hook = hook
    bad = []
    try:
        with toy.commits_reported(reported.append, early=early):
            toy.one_store(home)
        if not failed[0][1].endswith(".claims"):  # the lock files of a sealed store: gc sweeps what could not be removed
            bad.append("the failure was lost: the capture ended well")
    except (DiskFull, StorageFailed) as error:
        bad += _named_badly(error, code, failed)
    except Exception as error:  # noqa: BLE001 - any other exception is the finding
        bad.append(f"ended in {type(error).__name__}: {error}")
    finally:
        durable.step_hook = None
    bad += toy.lost(home, reported, expected) + toy.states(home, expected)
    bad += [f"temporary file left: {p.name}" for p in home.rglob("tmp/*")]
    bad += toy.finished(home, toy.one_store, [] if bad else reported, expected)
    return [f"{errno.errorcode[code]} {'from' if lasting else 'at'} step {step} {failed[:1]}: {b}" for b in bad]


def _named_badly(error: ActstoreError, code: int, failed: list[tuple[str, str]]) -> list[str]:
    """Return what the message lacks: the right class, and the call and path of a failure (two threads may meet one each)."""
    bad = []
    if isinstance(error, DiskFull) != (code in FULL):
        bad.append(f"{type(error).__name__} for {errno.errorcode[code]}")
    if not any(call in error.what and path == error.where for call, path in failed):
        bad.append(f"the message names {error.what} and {error.where}")
    return bad


def run(n: int, seed: int = 0) -> report.Result:
    """Let calls of a capture fail: every one with EIO, once and for good; then each other errno at a stride."""
    result = report.Result("I/O faults", "a call of a capture fails, once or for good")
    toy.start()
    with report.timed(result), report.scratch("faults") as folder:
        toy.one_store(folder / "reference")
        expected = toy.expected_of(folder / "reference")
        steps = count_steps(lambda: toy.one_store(folder / "count"))
        cases: list[Any] = [(step, errno.EIO, lasting) for lasting in (False, True) for step in range(steps)]
        others = [(s, code, lasting) for lasting in (False, True) for code in ERRNOS[1:] for s in range(steps)]
        wanted = min(len(others), max(0, n - len(cases)))
        cases += [others[(seed + i * len(others) // wanted) % len(others)] for i in range(wanted)]
        for case in cases:
            result.bad += one(folder / "home", *case, expected)
        result.n = len(cases)
        result.details = {"steps": steps}
        early = [one(folder / "home", s, errno.EIO, True, expected, early=True) for s in range(10, steps, steps // 12)]
        result.controls["reported before it is written"] = {"n": len(early), "bad": sum(map(bool, early))}
    return result


if __name__ == "__main__":
    report.main(run, 520)
