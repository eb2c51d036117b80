"""Damage a tiny store in thousands of ways; each must be found by `check_store`, and none may reach a reader.

    PYTHONPATH=tests python -m harness.damage --n 10000 --json

A damage is a few files with other bytes (or none). It is written, the store is checked and read, the bytes are put
back. A reader must either refuse or give exactly the true rows. The control switches the digest checks off: then damage
must go unnoticed, or this harness could not notice it either.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

from actstore.check import check_store
from actstore.errors import ActstoreError
from actstore.layout import arrays_of
from actstore.reader import open_folder
from harness import report
from harness.stores import GROUP_ROWS, small_groups, tiny_store

Files = dict[str, bytes | None]  # name below the store's folder: its bytes, or None when it is not there
Rows = dict[str, np.ndarray]


@dataclass
class Tally:
    """What came of it."""

    damages: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    not_found: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_chunk(name: str) -> bool:
    """Return whether a file holds rows; all others are small and damaged at every byte."""
    return "/c." in name


def thorough(files: dict[str, bytes], twin: dict[str, bytes], rng: random.Random) -> Iterator[tuple[str, Files]]:
    """Yield every damage of the finite kinds: each byte of the small files, each file and pair of files."""
    for name, data in files.items():
        for at in range(0 if is_chunk(name) else len(data)):
            yield f"flip {name}:{at}", {name: flipped(data, at, rng.randrange(8))}
        yield f"delete {name}", {name: None}
        yield f"empty {name}", {name: b""}
        yield f"cut {name}", {name: data[:-1]}
        yield f"extend {name}", {name: data + b"\0"}
        yield f"zero {name}", {name: bytes(len(data))}
        yield f"extra {name}.old", {f"{name}.old": data}
        if name in twin:
            yield f"foreign {name}", {name: twin[name]}
        for other in files:
            if other > name:
                yield f"swap {name}, {other}", {name: files[other], other: data}
    for group in ("0", "1"):
        ours = [n for n in files if n.startswith("row_groups/" + group) or n.split("/c.")[-1].split(".")[0] == group]
        yield f"foreign group {group}", {name: twin[name] for name in ours}
        yield f"delete group {group}", dict.fromkeys(ours)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    """Return the bytes with one bit the other way round."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def random_damage(files: dict[str, bytes], twin: dict[str, bytes], rng: random.Random) -> tuple[str, Files]:
    """Return one damage at a random place; four of five in the chunks."""
    chunks = [name for name in files if is_chunk(name)]
    name = rng.choice(chunks) if rng.random() < 0.8 else rng.choice(list(files))
    data = files[name]
    at, length = rng.randrange(len(data)), rng.randrange(1, 1 + min(512, len(data)))
    match rng.choice(("flip", "flip", "flips", "zero", "noise", "cut", "extend", "shift", "graft")):
        case "flip":
            return f"flip {name}:{at}", {name: flipped(data, at, rng.randrange(8))}
        case "flips":
            for _ in range(rng.randrange(2, 9)):
                data = flipped(data, rng.randrange(len(data)), rng.randrange(8))
            return f"flips {name}", {name: data}
        case "zero":
            return f"zero {name}:{at}+{length}", {name: data[:at] + bytes(len(data[at : at + length])) + data[at + length :]}
        case "noise":
            return f"noise {name}:{at}", {name: data[:at] + rng.randbytes(len(data[at : at + length])) + data[at + length :]}
        case "cut":
            return f"cut {name}:{at}", {name: data[:at]}
        case "extend":
            return f"extend {name}+{length}", {name: data + rng.randbytes(length)}
        case "shift":
            return f"shift {name}:{at}", {name: data[:at] + data[at + 1 :] + data[at : at + 1]}
        case _:
            foreign = twin.get(name, data)
            return f"graft {name}:{at}", {name: data[:at] + foreign[at : at + length] + data[at + length :]}


def put(folder: Path, files: Files) -> None:
    """Write (or delete) files of a store's folder."""
    for name, data in files.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(data)


def refuses(folder: Path, true_rows: Rows, places: list[tuple[str, int]]) -> tuple[bool, bool]:
    """Read chunks of a damaged store as a trainer would.

    Returns: whether anything was refused, and whether anything that was read is untrue.
    """
    refused = untrue = False
    try:
        store = open_folder(folder)
    except ActstoreError:
        return True, False
    for at, (array, group) in enumerate(places):
        rows = np.arange(group * GROUP_ROWS, min(len(true_rows[array]), (group + 1) * GROUP_ROWS))
        try:
            found = store.take(array, rows) if at % 2 else store.read(array, int(rows[0]), int(rows[-1]) + 1)
        except ActstoreError:
            refused = True
            continue
        untrue |= found.tobytes() != true_rows[array][rows].tobytes()
    return refused, untrue


def places_of(change: Files, rng: random.Random) -> list[tuple[str, int]]:
    """Return the chunks to read after a damage: those it touches, and one at random."""
    places = {(rng.choice(arrays_of("float32")), rng.randrange(2))}
    for name in change:
        folder, _, base = name.partition("/")
        if folder == "row_groups":
            places |= {(array, int(base[0])) for array in arrays_of("float32")}
        elif base.startswith("c."):
            places.add((folder, int(base.split(".")[1])))
    return sorted(places)


def run(folder: Path, n: int, seed: int = 0, *, finite_kinds: bool = True) -> Tally:
    """Do at least `n` damages to a tiny store made in `folder`: all of the finite kinds, then random ones."""
    started, rng, tally = time.monotonic(), random.Random(seed), Tally()
    small_groups()
    store, other = tiny_store(folder / "a"), tiny_store(folder / "b", seed=1)
    for path in (store.path, *store.path.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    files, twin = files_of(store.path), files_of(other.path)
    true_rows = {array: store.read(array, 0, store.rows).copy() for array in arrays_of("float32")}
    finite = thorough(files, twin, rng) if finite_kinds else iter(())
    endless = iter(lambda: random_damage(files, twin, rng) if tally.damages < n else None, None)
    for what, change in itertools.chain(finite, endless):
        if all(files.get(name) == data for name, data in change.items()):
            continue  # this one changed nothing
        tally.damages += 1
        tally.by_kind[what.split(" ")[0]] += 1
        put(store.path, change)
        try:
            if not check_finds(store.path):
                tally.not_found.append(what)
            refused, untrue = refuses(store.path, true_rows, places_of(change, rng))
            tally.refused += refused
            if untrue:
                tally.served.append(what)
        finally:
            put(store.path, {name: files.get(name) for name in change})
    assert not check_finds(store.path), "the harness did not put every byte back"
    tally.seconds = time.monotonic() - started
    return tally


def check_finds(folder: Path) -> bool:
    """Return whether `actstore verify --data` would report anything."""
    try:
        return bool(check_store(folder, data=True).findings)
    except ActstoreError:
        return True


class _EqualToAll(int):
    """A crc32c that matches whatever it is compared with."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return True


class _NeverOther(str):
    """A SHA-256 that differs from nothing."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


@contextlib.contextmanager
def digests_off() -> Iterator[None]:
    """The control: the reader's crc32c and the checker's SHA-256 of chunks match everything."""
    with (
        mock.patch("actstore.mapped._crc32c", lambda *args: _EqualToAll()),
        mock.patch("actstore.check.sha256_file", lambda *args: _NeverOther()),
    ):
        yield


def piece(n: int, seed: int = 0) -> report.Result:
    """Do `n` damages, and some with the digest checks off."""
    result = report.Result("damage", "one damage of a sealed store: found by verify --data, and nothing untrue read")
    with report.timed(result), report.scratch("damage") as folder:
        tally = run(folder / "on", n, seed)
        result.n, result.details = tally.damages, {"by kind": dict(tally.by_kind), "refused by the reader": tally.refused}
        result.bad = [f"not found: {w}" for w in tally.not_found] + [f"served: {w}" for w in tally.served]
        with digests_off():
            off = run(folder / "off", 200, seed, finite_kinds=False)
        result.controls = {
            "digests off: not found": {"n": off.damages, "bad": len(off.not_found)},
            "digests off: served": {"n": off.damages, "bad": len(off.served)},
        }
    return result


if __name__ == "__main__":
    report.main(piece, 10_000)
