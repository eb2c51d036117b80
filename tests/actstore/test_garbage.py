"""gc deletes leftovers and trash only, and never what a process holds."""

from __future__ import annotations

import os
import shutil

import pytest

from actstore import durable
from actstore.capture import Progress, capture
from actstore.catalog import digests_in, open_store
from actstore.check import check_store
from actstore.garbage import collect
from actstore.layout import StorePaths


class StopError(Exception):
    pass


def stop(rows: int) -> None:
    raise StopError


@pytest.fixture
def stores(toy_request, toy_store):
    """A sealed store, an unsealed one, trash, and a repair's scratch place."""
    folder = toy_store.path.parent
    with pytest.raises(StopError):
        capture(toy_request(dtype="float16"), Progress(on_rows=stop))
    for parent in (".trash", ".repair/.staging"):
        (folder / parent / ("a" * 64)).mkdir(parents=True)
        (folder / parent / ("a" * 64) / "file").write_bytes(b"12345")
    (folder / ".locks" / ("b" * 64 + ".claims")).mkdir()
    (folder / ".trash" / "not a digest").mkdir()
    return folder


def test_dry_run_lists_and_deletes_nothing(stores):
    before = sorted(stores.rglob("*"))
    found = collect(stores, dry_run=True)
    assert sorted(one.kind for one in found) == ["claims", "claims", "scratch", "trash", "unsealed"]
    assert [p for p in sorted(stores.rglob("*")) if p.suffix != ".lock"] == [p for p in before if p.suffix != ".lock"]
    assert {one.bytes for one in found if one.kind in ("trash", "scratch")} == {5}


def test_everything_but_sealed_stores_goes(stores, toy_store):
    collect(stores)
    assert collect(stores) == []
    assert digests_in(stores) == [toy_store.digest] and digests_in(stores / ".staging") == []
    assert not check_store(toy_store.path, data=True).findings
    assert (stores / ".trash" / "not a digest").is_dir()  # not ours


def test_what_a_process_holds_stays(stores, toy_request):
    (digest,) = digests_in(stores / ".staging")
    with durable.lock(StorePaths(stores, digest).lock, "a capture, pid 1"):
        found = collect(stores)
    held = [one for one in found if one.held_by]
    assert {one.digest for one in held} == {digest} and digests_in(stores / ".staging") == [digest]
    assert open_store(capture(toy_request(dtype="float16"))[0], stores).rows  # and the capture goes on


def test_links_in_the_place_of_leftovers_go_and_what_they_point_to_stays(stores, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"1")
    for parent in (".trash", ".staging", ".repair/.staging"):
        (stores / parent / ("c" * 64)).symlink_to(tmp_path / "elsewhere")
    assert [one.digest for one in collect(stores)].count("c" * 64) >= 2  # the unsealed one moves into the trash
    assert collect(stores) == [] and (tmp_path / "elsewhere" / "file").read_bytes() == b"1"


def test_a_leftover_that_vanishes_while_it_is_looked_at_is_passed_over(stores, monkeypatch):
    """As when its capture seals it, or a second collection deletes it, between the listing and the lock."""
    (digest,) = digests_in(stores / ".staging")
    monkeypatch.setattr("actstore.garbage.committed_groups", lambda folder: shutil.rmtree(folder))
    lstat = os.lstat

    def gone(path, **kwargs):
        if str(path).endswith("key.json"):
            raise FileNotFoundError(path)
        return lstat(path, **kwargs)

    monkeypatch.setattr("os.lstat", gone)
    assert digest and collect(stores) == []
    assert not (stores / ".staging" / digest).exists()
