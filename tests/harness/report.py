"""What a piece of the harness returns, and the command line that every piece shares."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 20  # findings kept in a report: the first ones tell, thousands do not


class MissingToolsError(RuntimeError):
    """A piece needs root or a tool that is not here."""


@dataclass
class Result:
    """One piece: how many cases, which were bad, and what its controls (protection off) gave.

    Args:
        piece: short name of the piece.
        what: what one case is, for the table.
        n: cases run.
        bad: one sentence for each case that broke a promise.
        controls: for each control how many cases it ran and how many of them were bad: some must be.
        details: further counts.
        seconds: wall time, controls included.
        skipped: why nothing was run, or "".
    """

    piece: str
    what: str
    n: int = 0
    bad: list[str] = field(default_factory=list)
    controls: dict[str, dict[str, int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether no case was bad and every control failed as it must."""
        return not self.bad and all(c["bad"] for c in self.controls.values())

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values, with the number of bad cases and the first of them."""
        return {**asdict(self), "n_bad": len(self.bad), "bad": self.bad[:SHOWN], "ok": self.ok}


@contextlib.contextmanager
def timed(result: Result) -> Iterator[Result]:
    """Add the wall time of a block to a result."""
    start = time.monotonic()
    try:
        yield result
    finally:
        result.seconds = round(result.seconds + time.monotonic() - start, 1)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Yield an empty folder in memory, where fsync costs nothing: killed processes and modelled disks need no real one."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"actstore-{name}-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def need_root_tools(*tools: str, root: bool = True) -> None:
    """Refuse to go on without root or a tool.

    Elsewhere a test then skips with the reason; in CI (environment CI=true) it fails: a piece that never runs proves
    nothing.

    Raises: MissingToolsError.
    """
    missing = [tool for tool in tools if shutil.which(tool) is None]
    missing += ["root"] if root and os.geteuid() != 0 else []
    if missing:
        raise MissingToolsError(f"needs {', '.join(missing)}")


def main(piece: Callable[..., Result], n: int) -> None:
    """Run a piece from the command line: `python -m harness.kills --n 2000 --json`."""
    parser = argparse.ArgumentParser(description=(sys.modules[piece.__module__].__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=n, help=f"cases to run (default {n})")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is sampled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        result = piece(options.n, seed=options.seed)
    except MissingToolsError as error:
        if os.environ.get("CI") == "true":
            raise
        result = Result(piece.__module__.rpartition(".")[2], "", skipped=str(error))
    if options.json:
        print(json.dumps(result.as_json()))
    else:
        print(line_of(result.as_json()), *result.bad[:SHOWN], sep="\n  ")
    sys.exit(0 if result.ok else 1)


def line_of(result: dict[str, Any]) -> str:
    """Return a result as one line of text."""
    controls = ", ".join(f"{name}: {c['bad']} of {c['n']} bad" for name, c in result["controls"].items()) or "none"
    return f"{result['piece']}: {result['n']} run, {result['n_bad']} bad; controls: {controls}; {result['seconds']} s"
