"""Stores that differ only in the rows asked for share their full row groups: linked, verified, or copied."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY

from actstore import link
from actstore.backends.toy import ToyBackend
from actstore.capture import CaptureRequest, Plan, Progress, StoppedError, capture
from actstore.catalog import open_store, remove_store
from actstore.check import check_store
from actstore.layout import chunk_name
from actstore.reader import Store

CHUNK = chunk_name("acts", 0)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


def captured(request: CaptureRequest, notes: list[str] | None = None) -> tuple[Store, Plan]:
    plans: list[Plan] = []
    digest = capture(request, Progress(on_plan=plans.append, on_note=(notes if notes is not None else []).append))[0]
    return open_store(digest, request.stores), plans[0]


def same_file(a: Store, b: Store, name: str) -> bool:
    return os.path.samefile(a.path / name, b.path / name)


@pytest.mark.parametrize("rows, linked", [(None, 3), (5000, 3), (2500, 2), (1024, 1), (3072, 3)])
def test_larger_and_smaller_stores_share_full_row_groups_and_equal_a_capture_of_their_own(toy_request, tmp_path, rows, linked):
    first, _ = captured(toy_request(rows=3500))
    store, plan = captured(toy_request(rows=rows))
    assert plan.stores[0]["linked"] == linked
    assert [same_file(first, store, chunk_name(a, i)) for a in ("acts", "tokens") for i in range(linked)] == [True] * 2 * linked
    assert not check_store(store.path, data=True).findings
    alone, _ = captured(toy_request(rows=rows, stores=tmp_path / "alone"))
    assert store.content_digest == alone.content_digest
    if linked < len(store.manifest.groups):
        assert not (first.path / chunk_name("acts", linked)).exists() or not same_file(first, store, chunk_name("acts", linked))


def test_what_an_unfinished_capture_has_committed_is_shared_too(toy_request, tmp_path, monkeypatch):
    """A capture that was stopped: a store of the rows that are there costs links, and the longer one still goes on."""
    asked = iter([False, False, False, True])
    with pytest.raises(StoppedError):
        capture(toy_request(rows=5000), Progress(stop=lambda: next(asked)))

    def refuse(*args):
        raise AssertionError("the model ran")

    with monkeypatch.context() as patch:
        patch.setattr(ToyBackend, "launch", refuse)
        store, plan = captured(toy_request(rows=3072))
    assert plan.stores[0]["linked"] == 3 and not check_store(store.path, data=True).findings
    alone, _ = captured(toy_request(rows=3072, stores=tmp_path / "alone"))
    assert store.content_digest == alone.content_digest
    longer, plan = captured(toy_request(rows=5000))
    assert plan.stores[0]["committed"] == 3 and same_file(longer, store, CHUNK)


def test_only_keys_that_differ_in_nothing_but_rows_share(toy_request):
    captured(toy_request(rows=3500))
    for other in ({"dtype": "float16"}, {"seq_len": 33}, {"hooks": ("hook_embed",)}, {"bos": False}, {"model": "toy:15"}):
        assert captured(toy_request(rows=2048, **other))[1].stores[0]["linked"] == 0


def test_a_source_is_what_its_manifest_says_not_what_lies_beside_it(toy_request, tmp_path):
    """The key.json of one hook point's store, put into another's: its rows must not come in under the wrong name."""
    first, _ = captured(toy_request(rows=3500))
    other, _ = captured(toy_request(rows=3500, hooks=("blocks.1.hook_resid_pre",)))
    key = (first.path / "key.json").read_bytes()
    remove_store(first.digest, first.path.parent)
    os.chmod(other.path / "key.json", 0o644)
    (other.path / "key.json").write_bytes(key)
    store, plan = captured(toy_request(rows=2500))
    alone, _ = captured(toy_request(rows=2500, stores=tmp_path / "alone"))
    assert plan.stores[0]["linked"] == 0 and store.content_digest == alone.content_digest


def test_a_chunk_as_large_as_they_come_is_copied_too(toy_request, monkeypatch):
    """1,024 rows of 16,384 float32 are 64 MiB, beyond what a chunk is cut to; here scaled down."""
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4 // 2)
    monkeypatch.setattr("os.link", refuse_links)
    first, _ = captured(toy_request(rows=1100))
    notes: list[str] = []
    store, plan = captured(toy_request(rows=2500), notes)
    assert plan.stores[0]["linked"] == 1 and not notes
    assert not same_file(first, store, CHUNK) and not check_store(store.path, data=True).findings


def refuse_links(*args, **kwargs):
    raise OSError(errno.EPERM, "no hard links here")


def test_without_hard_links_files_are_copied(toy_request, monkeypatch):
    first, _ = captured(toy_request(rows=3500))

    monkeypatch.setattr(os, "link", refuse_links)
    store, _ = captured(toy_request(rows=2500))
    assert not same_file(first, store, CHUNK) and (first.path / CHUNK).read_bytes() == (store.path / CHUNK).read_bytes()


def damage(store: Store, name: str) -> None:
    os.chmod(store.path / name, 0o644)
    with open(store.path / name, "r+b") as file:
        file.seek(100)
        file.write(b"damaged")


@pytest.mark.parametrize("name", [CHUNK, chunk_name("documents", 0), "row_groups/0.json"])
def test_a_damaged_row_group_is_not_shared_but_computed(toy_request, name):
    first, _ = captured(toy_request(rows=3500))
    damage(first, name)
    notes: list[str] = []
    store, _ = captured(toy_request(rows=2500), notes)
    assert len(notes) == 1 and "computed, not shared" in notes[0] and first.digest[:12] in notes[0]
    assert not check_store(store.path, data=True).findings
    assert not same_file(first, store, CHUNK) and same_file(first, store, chunk_name("acts", 1))


def test_control_without_verification_damage_spreads(toy_request, monkeypatch):
    """What the test above would see if the digests were not compared before linking."""
    first, _ = captured(toy_request(rows=3500))
    damage(first, CHUNK)
    monkeypatch.setattr(link, "group_findings", lambda store, group, data: [])
    store, _ = captured(toy_request(rows=2500))
    assert check_store(store.path, data=True).findings


def test_removing_one_store_leaves_the_other_whole(toy_request):
    first, _ = captured(toy_request(rows=3500))
    store, _ = captured(toy_request(rows=2500))
    remove_store(first.digest, first.path.parent)
    assert not check_store(store.path, data=True).findings


def test_a_real_model_computes_the_same_bits_whatever_rows_are_asked_for(tiny_corpus: Path, tmp_path, monkeypatch):
    """The batch that holds the last row is completed, so its shape, and with it every rounding, is the same."""
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 192 * 4)
    base = {"model": str(TINY), "hooks": ("blocks.1.hook_resid_pre",), "corpus": (tiny_corpus,), "batch_tokens": 640}
    stores = [
        open_store(capture(CaptureRequest(**base, rows=rows, stores=tmp_path / str(rows)))[0], tmp_path / str(rows))
        for rows in (1025, 2048, 2100)
    ]
    for store in stores[:2]:
        np.testing.assert_array_equal(store[:], stores[2][: store.rows])
