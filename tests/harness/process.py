"""Forked children that report what they have done and die where they are told to."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore import durable

Report = Callable[[Any], None]
Work = Callable[[Report], None]
CHILD_SECONDS = 120  # a child that hangs is killed by SIGALRM


def import_numba() -> None:
    """Import what numba imports with its first compiled loop, here and not in each child; to run one would start threads."""
    from numba.core.registry import cpu_target

    for context in (cpu_target.typing_context, cpu_target.target_context):
        context.refresh()


def in_child(work: Work) -> tuple[int, list[Any]]:
    """Run `work(report)` in a forked child.

    Returns: (its wait status, everything it reported). A report is in the pipe before the child's next instruction, so
        it outlives any kill. An exception of `work` is reported as {"error": …} and ends in status 1.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        signal.alarm(CHILD_SECONDS)
        code = 1

        def report(value: Any) -> None:
            os.write(write_end, json.dumps(value).encode() + b"\n")

        try:
            work(report)
            code = 0
        except BaseException:  # noqa: BLE001 - carried to the parent as text
            report({"error": traceback.format_exc()[-2000:]})
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:  # ends at the child's death: nothing else holds the write end
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return status, [json.loads(line) for line in lines]


def kill_at(n: int, work: Work, before: Callable[[], None] = lambda: None) -> tuple[bool, list[Any]]:
    """Run `work` in a child that is killed by SIGKILL at its n-th step, before the system call is made.

    Args:
        n: which step, from 0.
        work: what to do.
        before: called just before the kill, for example to cut the disk's power.

    Returns: (whether it was killed: False when it had fewer steps, what it reported).
    """

    def until_killed(report: Report) -> None:
        count = itertools.count()  # its `next` is atomic: two threads of a capture take steps

        def hook(name: str, path: Path) -> None:
            if next(count) == n:
                before()
                os.kill(os.getpid(), signal.SIGKILL)

        durable.step_hook = hook
        work(report)

    status, reported = in_child(until_killed)
    errors = [value["error"] for value in reported if isinstance(value, dict) and "error" in value]
    if errors:
        raise AssertionError(f"the job failed by itself, it was not killed: {errors[0]}")
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, reported


def count_steps(work: Callable[[], None]) -> int:
    """Run `work` here and return how many steps it took."""
    count = itertools.count()
    durable.step_hook = lambda name, path: next(count) and None
    try:
        work()
    finally:
        durable.step_hook = None
    return next(count)


def copy_home(source: Path, target: Path, *, link: bool) -> None:
    """Copy a folder tree. With `link` its files are shared: right as long as nobody writes into an existing file."""

    def one(a: str, b: str) -> None:
        # The lock file is the one file that is written in place.
        os.link(a, b) if link and not a.endswith(".lock") else shutil.copy(a, b)

    shutil.copytree(source, target, copy_function=one, symlinks=True)
