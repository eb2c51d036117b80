"""What a machine, a folder of stores and a way to the hub are good for: one line each, with what to do."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from actstore import durable
from actstore.catalog import list_stores
from actstore.check import check_store
from actstore.errors import ActstoreError, DiskFull, StorageFailed, StoreDamaged, StoreLocked, UsageError
from actstore.mounts import network_filesystem

PROBE_BYTES = 32 << 20  # one row group
SLOW_BYTES_S = 30e6  # a small model on two cores gives about this much
LOW_BYTES = 10e9
HUB_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor.

    Args:
        name: what was looked at.
        state: "ok"; "warn": it works, but; "fail": something will not work.
        text: what was found.
        do: what to do about it, or "".
        code: exit code of a failure, as of the error that it would become; else 0.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str
    do: str = ""
    code: int = 0


def warn_if(bad: bool, name: str, text: str, do: str) -> Check:
    """Return a check that warns, and says what to do, or that is ok."""
    return Check(name, "warn", text, do) if bad else Check(name, "ok", text)


def check_versions() -> Iterator[Check]:
    """Yield Python, and each package that this distribution requires; of the optional ones those that are there."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    needed = (Requirement(line) for line in ["actstore", *(requires("actstore") or [])])
    for name, requirement in {r.name: r for r in needed if "dev" not in str(r.marker)}.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "" if requirement.marker is None else "left out"
        if found and requirement.specifier.contains(found, prereleases=True):
            yield Check(name, "ok", found)
        elif found != "left out":
            said = f"{found or 'not installed'}, {requirement.specifier or 'it'} is needed"
            yield Check(name, "fail", said, f"pip install '{name}{requirement.specifier}'", UsageError.exit_code)


def check_folder(stores: Path) -> Iterator[Check]:
    """Yield the space, speed and locks of a folder of stores, or of its nearest parent that exists; nothing is left there."""
    folder = next(path for path in (stores.absolute(), *stores.absolute().parents) if path.is_dir())
    free, network, probe = durable.free_bytes(folder), network_filesystem(folder), folder / f".doctor-{os.getpid()}"
    yield warn_if(free < LOW_BYTES, "disk", f"{free / 1e9:.1f} GB free in {folder}", "make space, or name another --stores")
    if network:
        said = f"{network}, a network file system: locks and renames are not promised there"
        yield Check("file system", "warn", said, "capture on a local disk, then `actstore push`")
    try:
        began = time.perf_counter()
        durable.make_dir(probe)
        durable.write_new(probe, "file", [os.urandom(PROBE_BYTES)])
        speed = PROBE_BYTES / (time.perf_counter() - began)
        yield warn_if(speed < SLOW_BYTES_S, "write, sync, rename", f"{speed / 1e6:.0f} MB/s", "a capture will wait for this disk")
        linked = durable.link(probe / "file", probe, "link")
        yield warn_if(not linked, "hard links", "work" if linked else "none", "stores that share row groups are copied")
        yield _check_lock(probe / "lock")
    except (DiskFull, StorageFailed) as error:
        do = error.do or "name a folder that you may write with --stores"
        yield Check("write, sync, rename", "fail", error.what, do, error.exit_code)
    finally:
        with contextlib.suppress(StorageFailed):
            durable.remove_tree(probe)


def _check_lock(path: Path) -> Check:
    with durable.lock(path, "the doctor"):
        try:
            with durable.lock(path, "the doctor"):
                return Check("locks", "fail", "two holders of one lock", "capture on a local disk", StorageFailed.exit_code)
        except StoreLocked:
            return Check("locks", "ok", "flock works")


def check_hub() -> Iterator[Check]:
    """Yield whether the Hugging Face hub answers, where its files are kept, and whether there is a token; never the token."""
    from huggingface_hub import constants, get_token

    token = "a token is there" if get_token() else "no token (gated models need one: `hf auth login`)"
    kept = f"files in {constants.HF_HOME}; {token}"
    if constants.HF_HUB_OFFLINE:
        yield Check("hub", "ok", f"offline, as HF_HUB_OFFLINE says; {kept}")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
        yield Check("hub", "ok", f"{constants.ENDPOINT} answers; {kept}")
    except (OSError, ValueError) as error:
        do = "use local folders with --model and --corpus, and set HF_HUB_OFFLINE=1 so that nothing waits for it"
        yield Check("hub", "warn", f"{constants.ENDPOINT} does not answer ({type(error).__name__}); {kept}", do)


def check_stores(stores: Path) -> Iterator[Check]:
    """Yield each store that is damaged (sizes and records; no data is read) or unsealed, and how many are whole."""
    whole = 0
    for line in list_stores(stores):
        name = f"store {line.digest[:12]}"
        try:
            findings = [line.problem] if line.problem else check_store(stores / line.digest).findings if line.sealed else []
        except (ActstoreError, OSError) as error:
            findings = [str(error.args[0])]
        if findings:
            do = f"`actstore verify {line.digest[:12]} --data`, then `actstore repair {line.digest[:12]}`"
            yield Check(name, "fail", str(findings[0]).split("\n")[0], do, StoreDamaged.exit_code)
        elif not line.sealed:
            yield Check(
                name, "warn", f"unsealed: {line.how_far}", "run its capture again to go on, or `actstore gc` to delete it"
            )
        whole += line.sealed and not findings
    yield Check("stores", "ok", f"{whole} whole in {stores} (sizes and records; `actstore verify HASH --data` reads every byte)")
