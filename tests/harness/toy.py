"""The toy capture that the harness kills, starves and cuts off: two row groups of two dimensions.

Nothing here imports torch, zarr or pytest: a process of 45 MB forks in 3 ms, one with zarr in 6 ms, and thousands do.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import actstore.manifest
import actstore.pipeline
import actstore.plan
from actstore.capture import CaptureRequest, capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.errors import ActstoreError, StoreNotSealed
from actstore.layout import StorePaths, arrays_of, chunk_name, record_name
from actstore.manifest import parse_manifest

ONE_HOOK = ("blocks.0.hook_resid_pre",)
TWO_HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")
D_MODEL = 2
GROUP_ROWS = 1024  # the smallest there is
MEASURED = re.compile(
    rb'"elapsed_s":[^,}]*|"timeline":\{[^}]*\}|"digest":"[0-9a-f]*"'
)  # what differs from run to run in a manifest
TEXT = "the quick brown fox jumps over the lazy dog and runs away from 12 angry sheep "


def request(home: Path, hooks: tuple[str, ...] = ONE_HOOK) -> CaptureRequest:
    """Return the request of a capture of about 1,500 rows into `home/stores`; the corpus is written when it is not there."""
    corpus = home / "corpus.jsonl"
    if not corpus.exists():
        home.mkdir(parents=True, exist_ok=True)
        corpus.write_text("".join(json.dumps({"text": f"{i} {TEXT * 4}"}) + "\n" for i in range(5)))
    return CaptureRequest(
        model=f"toy:{D_MODEL}", hooks=hooks, corpus=(corpus,), seq_len=64, backend="toy", stores=home / "stores",
        batch_tokens=512,
    )  # fmt: skip


def one_store(home: Path) -> None:
    """Capture one hook point."""
    capture(request(home))


def two_stores(home: Path) -> None:
    """Capture two hook points in one pass."""
    capture(request(home, TWO_HOOKS))


def small_groups() -> None:
    """Make this process use row groups of GROUP_ROWS rows, so that a tiny capture has several."""
    actstore.manifest.MAX_CHUNK_BYTES = GROUP_ROWS * D_MODEL * 4


def quicken() -> None:
    """Remember, in this process, the versions of installed packages, a third of a toy capture; no result changes."""
    importlib.metadata.version = functools.cache(importlib.metadata.version)  # type: ignore[assignment]


def start() -> None:
    """Prepare this process for toy captures."""
    small_groups()
    quicken()
    gc.collect()
    gc.freeze()  # a collection in a forked child would copy every page of this process
    gc.disable()


def no_reserve() -> None:
    """Let captures of this process start on a small disk: past the check before the start, into the real errors."""
    actstore.plan.MIN_FREE_BYTES = -(1 << 60)


@contextmanager
def commits_reported(report: Callable[[Any], None], *, early: bool = False) -> Iterator[None]:
    """Call `report([store digest, row group])` each time that `put_rows` has returned: the promise is made then.

    With `early` it is made before `put_rows` is called: a control.
    """
    put_rows = actstore.pipeline.put_rows

    def reporting(writer: Any, index: int, *arrays: Any) -> None:
        if early:
            report([writer.paths.digest, index])
        put_rows(writer, index, *arrays)
        if not early:
            report([writer.paths.digest, index])

    actstore.pipeline.put_rows = reporting  # type: ignore[assignment]
    try:
        yield
    finally:
        actstore.pipeline.put_rows = put_rows  # type: ignore[assignment]


def files_of_group(group: int) -> list[str]:
    """Return the names of a row group's files below its store."""
    return [record_name(group), *(chunk_name(array, group) for array in arrays_of("float32"))]


def sha256(path: Path) -> str:
    """Return a file's digest, or "missing"."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


@dataclass(frozen=True)
class Expected:
    """What an uninterrupted run gives: content digests by store digest, and the digests of every row group's files."""

    content: dict[str, str]
    files: dict[tuple[str, int], dict[str, str]]


def expected_of(home: Path) -> Expected:
    """Read what a finished, uninterrupted capture has left."""
    content, files = {}, {}
    for line in list_stores(home / "stores"):
        store = open_store(home / "stores" / line.digest)
        content[line.digest] = store.content_digest
        for group in range(len(store.manifest.groups)):
            files[line.digest, group] = {name: sha256(store.path / name) for name in files_of_group(group)}
    return Expected(content, files)


def lost(home: Path, reported: list[Any], expected: Expected) -> list[str]:
    """Return the reported row groups whose files are not there with the same bytes."""
    bad = []
    for digest, group in reported:
        paths = StorePaths(home / "stores", digest)
        folder = paths.sealed if paths.sealed.is_dir() else paths.staging
        found = {name: sha256(folder / name) for name in files_of_group(group)}
        bad += [
            f"committed row group {group}: {name} is {found[name][:12]}"
            for name, wanted in expected.files[digest, group].items()
            if found[name] != wanted
        ]
    return bad


def states(home: Path, expected: Expected) -> list[str]:
    """Return every store that is neither sealed and whole nor visibly unsealed."""
    bad = []
    for line in list_stores(home / "stores"):
        paths = StorePaths(home / "stores", line.digest)
        try:
            store = open_store(line.digest, home / "stores")
            findings = check_store(store.path, data=True).findings
            if store.content_digest != expected.content[line.digest]:
                findings.append("another content digest")
            bad += [f"sealed, but {finding}" for finding in findings]
        except StoreNotSealed:
            if paths.sealed.exists():
                bad.append("a store under its final name is unsealed")
        except ActstoreError as error:
            bad.append(f"a third state: {type(error).__name__}: {error.what}")
    return bad


def identities(home: Path, reported: list[Any]) -> list[tuple[int, int]]:
    """Return inode and modification time of the reported groups' activations: they stay when nothing is recomputed."""
    found = []
    for digest, group in reported:
        paths = StorePaths(home / "stores", digest)
        folder = paths.sealed if paths.sealed.is_dir() else paths.staging
        if (folder / chunk_name("acts", group)).exists():  # if not, `lost` has said so
            status = (folder / chunk_name("acts", group)).stat()
            found.append((status.st_ino, status.st_mtime_ns))
    return found


def finished(home: Path, run: Callable[[Path], None], reported: list[Any], expected: Expected) -> list[str]:
    """Repeat a capture; return what is wrong then: another digest, findings, left-overs, committed rows recomputed."""
    before = identities(home, reported)
    try:
        run(home)
    except ActstoreError as error:
        return [f"the rerun ended in {type(error).__name__}: {error.what} ({error.where})"]
    bad = states(home, expected)
    listed = {line.digest for line in list_stores(home / "stores") if line.sealed}
    if listed != set(expected.content):
        bad.append(f"the rerun left {len(listed)} sealed stores, {len(expected.content)} are expected")
    if identities(home, reported) != before:
        bad.append("the rerun computed committed rows again")
    bad += [f"left over: {p.name}" for p in (home / "stores" / ".staging").iterdir()]
    return bad


def is_manifest(data: bytes) -> bool:
    """Return whether these bytes are a whole manifest."""
    try:
        parse_manifest(data)
    except ActstoreError:
        return False
    return True


def fingerprint(home: Path) -> str:
    """Return a digest of all that a home holds, but for random names, pids in lock files, and seconds in a manifest."""
    found = []
    for folder, _, names in os.walk(home):
        inside = folder[len(str(home)) :]
        for name in names:
            data = b"" if name.endswith(".lock") else Path(folder, name).read_bytes()
            if name == "manifest.json":
                data = MEASURED.sub(b"", data)
            found.append(f"{inside} {'' if inside.endswith('/tmp') else name} {hashlib.sha256(data).hexdigest()}")
        found.append(inside)
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
