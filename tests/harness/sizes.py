"""A disk that is really full: tmpfs of every size from one page to enough. Fault matrix row 5."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actstore.errors import ActstoreError, DiskFull
from harness import report, toy

PAGE = 4096
ENOUGH = 80 * PAGE  # bytes; the toy capture takes about 60 pages
GROWN = 4 << 20
MANY = 10_000  # inodes


def mounted(folder: Path, options: str, *arguments: str) -> Any:
    """Return a context in which `mount arguments -o options folder` holds."""

    @contextlib.contextmanager
    def context() -> Iterator[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", *arguments, "-o", options, *([] if arguments[:1] != ("-t",) else ["tmpfs"]), str(folder)], check=True
        )
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    return context()


def one(home: Path, size: int, inodes: int, expected: toy.Expected, *, early: bool = False) -> tuple[bool, list[str]]:
    """Capture onto a disk of `size` bytes and `inodes` files, then make it larger and capture again.

    Returns: (whether the disk was full, what was wrong).
    """
    bad: list[str] = []
    reported: list[Any] = []
    full = False
    with mounted(home / "stores", f"size={size},nr_inodes={inodes}", "-t", "tmpfs"):
        try:
            with toy.commits_reported(reported.append, early=early):
                toy.one_store(home)
        except DiskFull as error:
            full = True
            if not re.search(r"needs \d+ bytes, \d+ are free", error.what):
                bad.append(f"without needed and free bytes: {error.what}")
        except (ActstoreError, OSError) as error:
            full = True
            bad.append(f"{type(error).__name__} instead of DiskFull: {error}")
        bad += toy.lost(home, reported, expected) + toy.states(home, expected)
        bad += [f"temporary file left: {p}" for p in home.rglob("tmp/*")]
        subprocess.run(["mount", "-o", f"remount,size={GROWN},nr_inodes={MANY}", str(home / "stores")], check=True)
        bad += toy.finished(home, toy.one_store, reported, expected)
    return full, [f"size {size}, {inodes} inodes: {b}" for b in bad]


def run(n: int, seed: int = 0) -> report.Result:
    """Capture onto `n` disk sizes, in pages and in inodes."""
    report.need_root_tools("mount", "umount")
    result = report.Result("disk sizes", "a tmpfs too small for the capture, grown afterwards")
    toy.start()
    toy.no_reserve()
    with report.timed(result), tempfile.TemporaryDirectory() as scratch:
        toy.one_store(Path(scratch, "reference"))
        expected = toy.expected_of(Path(scratch, "reference"))
        home = Path(scratch, "home")
        found = [one(home, *_size(i, n), expected) for i in range(n)]
        result.n = n
        result.details["full"] = sum(full for full, _ in found)
        result.bad = [b for _, bad in found for b in bad] if result.details["full"] else ["no disk was ever full"]
        early = [one(home, PAGE * (1 + i * 4), MANY, expected, early=True)[1] for i in range(15)]
        result.controls["reported before it is written"] = {"n": len(early), "bad": sum(map(bool, early))}
    return result


def _size(i: int, n: int) -> tuple[int, int]:
    """Return the i-th disk's bytes and inodes: every number of pages first, then every number of inodes with each."""
    pages = min(n, ENOUGH // PAGE)
    return PAGE * (1 + i % pages * (ENOUGH // PAGE) // pages), MANY if i < pages else 6 + (i - pages) // pages * 3


if __name__ == "__main__":
    report.main(run, 64)
