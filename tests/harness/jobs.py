"""Further jobs to be killed anywhere: a capture that shares row groups, one of several workers, a repair, a collection.

Each starts from a home in which something is sealed already, and what is sealed must stay as it is.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from actstore.capture import capture
from actstore.catalog import digests_in, open_store
from actstore.check import check_store
from actstore.errors import ActstoreError
from actstore.garbage import collect
from actstore.layout import StorePaths, chunk_name
from actstore.reader import open_unchecked
from actstore.repair import repair
from harness import toy

SHORT_ROWS = 1100  # one full row group, and a little


def short(home: Path) -> None:
    """Capture fewer rows of the corpus."""
    capture(dataclasses.replace(toy.request(home), rows=SHORT_ROWS))


def grown(home: Path) -> None:
    """Capture all rows; the first row group is shared with the shorter store."""
    toy.one_store(home)


def both(home: Path) -> None:
    """Make the shorter and the longer store, each on its own: what sharing must equal."""
    toy.one_store(home)
    other = home / "alone"
    toy.request(other)
    shutil.copy(home / "corpus.jsonl", other / "corpus.jsonl")
    short(other)
    (digest,) = digests_in(other / "stores")
    (other / "stores" / digest).rename(home / "stores" / digest)


def worker(home: Path) -> None:
    """Capture as one of two workers; the other one never comes."""
    capture(dataclasses.replace(toy.request(home), workers=2, rank=1))


def damaged(home: Path) -> None:
    """Make a store and damage both of its row groups and a small file."""
    toy.one_store(home)
    (digest,) = digests_in(home / "stores")
    folder = home / "stores" / digest
    for name in (chunk_name("acts", 0), chunk_name("tokens", 1), "vocabulary.json"):
        data = bytearray((folder / name).read_bytes())
        data[50] ^= 1
        (folder / name).unlink()  # it may be shared with another home
        (folder / name).write_bytes(data)


def mend(home: Path) -> None:
    """Repair every store of a home."""
    for digest in digests_in(home / "stores"):
        repair(toy.request(home), open_unchecked(home / "stores" / digest), home / "stores")


def repair_survives(home: Path, reported: list[Any], expected: toy.Expected) -> list[str]:
    """After a kill: each file is the damaged one or the true one; the store is never more damaged than before."""
    bad = []
    for digest in digests_in(home / "stores"):
        damage = check_store(home / "stores" / digest, data=True).findings
        allowed = ("acts/c.0.0", "tokens/c.1", "vocabulary.json")
        bad += [f"new damage: {d}" for d in damage if not any(name in d for name in allowed)]
    return bad if digests_in(home / "stores") else ["the store is gone"]


def repair_finished(home: Path, run: Any, reported: list[Any], expected: toy.Expected) -> list[str]:
    """Repeat the repair: the store is whole, nothing is left over."""
    run(home)
    left = [str(p) for p in (home / "stores" / ".repair").rglob("*") if p.is_file() and p.suffix != ".lock"]
    return toy.states(home, expected) + [f"left over: {p}" for p in left]


def littered(home: Path) -> None:
    """Make a sealed store, an unsealed one and trash."""
    toy.one_store(home)
    (digest,) = digests_in(home / "stores")
    paths = StorePaths(home / "stores", "0" * 64)
    for folder in (paths.staging, paths.trash, paths.scratch.staging):
        shutil.copytree(home / "stores" / digest, folder)
        os.chmod(folder, 0o755)
    paths.claims.mkdir(parents=True)


def sweep(home: Path) -> None:
    """Collect the garbage of a home."""
    collect(home / "stores")


def sweep_survives(home: Path, reported: list[Any], expected: toy.Expected) -> list[str]:
    """After a kill: the sealed store is untouched."""
    (digest,) = expected.content
    try:
        open_store(digest, home / "stores")
    except ActstoreError as error:
        return [f"the sealed store: {error.what}"]
    return [f"the sealed store: {f}" for f in check_store(home / "stores" / digest, data=True).findings]


def sweep_finished(home: Path, run: Any, reported: list[Any], expected: toy.Expected) -> list[str]:
    """Repeat the collection: nothing is left of the leftovers."""
    run(home)
    stores = home / "stores"
    hidden = [stores / name for name in (".staging", ".trash", ".repair")]
    left = [p for folder in hidden for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return sweep_survives(home, reported, expected) + [f"left over: {p}" for p in left]
