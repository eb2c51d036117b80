"""Stores of format version 2: row groups in a table beside the manifest. Hostile tables are in tests/attacks."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import zarr
from helpers import flip, hostile, reopened, writable

from actstore import durable
from actstore.capture import capture
from actstore.catalog import list_stores, open_partial, open_store
from actstore.check import check_store
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError, StorageFailed, StoreDamaged
from actstore.layout import GROUPS, StorePaths, chunk_name, record_name
from actstore.limits import MAX_LISTED_GROUPS
from actstore.manifest import GROUPS_AT_ONCE, Digests, content_digest, parse_manifest, seal_manifest
from actstore.repair import repair
from actstore.seal import seal
from actstore.stats import no_rows
from actstore.writer import StoreWriter, open_writer


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


@pytest.fixture
def tabled(toy_request, small_groups, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_LISTED_GROUPS", 2)
    request = toy_request()
    return open_store(capture(request)[0], request.stores)


def listed(toy_request, monkeypatch, folder):
    monkeypatch.setattr("actstore.manifest.MAX_LISTED_GROUPS", MAX_LISTED_GROUPS)
    request = toy_request(stores=folder)
    return open_store(capture(request)[0], request.stores)


def test_both_formats_hold_the_same_under_the_same_digests(tabled, toy_request, monkeypatch, tmp_path):
    other = listed(toy_request, monkeypatch, tmp_path / "listed")
    assert (tabled.manifest.format, other.manifest.format) == (2, 1) and len(tabled.manifest.groups) == len(
        other.manifest.groups
    ) > 3
    assert (tabled.digest, tabled.content_digest, tabled.bytes) == (other.digest, other.content_digest, other.bytes)
    assert [tabled.manifest.groups[i] for i in range(len(other.manifest.groups))] == other.manifest.groups
    np.testing.assert_array_equal(tabled[:], other[:])
    np.testing.assert_array_equal(zarr.open_group(tabled.path, mode="r")["acts"][:], other[:])
    assert not check_store(tabled.path, data=True).findings
    assert tabled.bytes == sum(p.stat().st_size for p in tabled.path.glob("*/c.*"))
    (line,) = list_stores(tabled.path.parent)
    assert line.manifest is not None and len(line.manifest.groups) == len(other.manifest.groups) and not line.problem


@pytest.mark.parametrize("n", [1, 2, GROUPS_AT_ONCE, GROUPS_AT_ONCE + 1, 3 * GROUPS_AT_ONCE])
def test_the_content_digest_is_that_of_the_canonical_json(toy_store, n):
    groups = [sha256_bytes(b"%d" % i) for i in range(n)]
    spelled = canonical_json({"key": toy_store.digest, "rows": 5, "groups": groups})
    assert (
        content_digest(toy_store.key, 5, groups) == content_digest(toy_store.key, 5, Digests.of(groups)) == sha256_bytes(spelled)
    )


def test_only_stores_of_many_row_groups_have_a_table(toy_store):
    for n in (MAX_LISTED_GROUPS, MAX_LISTED_GROUPS + 1):
        manifest = seal_manifest(toy_store.key, n * 1024, 1 << 14, ["0" * 64] * n, {}, no_rows(1 << 14), {})
        assert (manifest.format, len(manifest.groups)) == (1 if n == MAX_LISTED_GROUPS else 2, n)


def test_a_manifest_of_format_2_is_not_read_without_its_table(tabled):
    data = (tabled.path / "manifest.json").read_bytes()
    assert "groups" not in json.loads(data)
    with pytest.raises(FormatError, match=GROUPS):
        parse_manifest(data)
    for fields in ({"format": 1}, {"groups": ["0" * 64]}, {"format": 3}):
        with pytest.raises(FormatError):
            parse_manifest(hostile(tabled.manifest, **fields), read_table=lambda size: tabled.manifest.groups.table)


def test_a_damaged_table_is_found_at_open_and_by_verify(tabled):
    flip(writable(tabled) / GROUPS, 40)
    for read in (reopened, lambda store: check_store(store.path)):
        with pytest.raises(FormatError, match=GROUPS):
            read(tabled)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "linked"])
def test_chunks_of_format_2_are_checked_at_first_touch(tabled, damage):
    path = writable(tabled) / chunk_name("acts", 1)
    if damage == "flipped":
        flip(path, 77)
    elif damage == "cut":
        os.truncate(path, 100)
    else:
        path.rename(path.with_name("elsewhere"))
        if damage == "linked":
            path.symlink_to(path.with_name("elsewhere"))
    store = reopened(tabled)
    np.testing.assert_array_equal(store[:1024], tabled[:1024])
    with pytest.raises((StoreDamaged, FormatError)):
        store[1024:1025]
    assert len(check_store(store.path, data=True).damaged) == 1


def test_a_damaged_row_group_of_format_2_is_repaired(tabled, toy_request):
    flip(writable(tabled) / chunk_name("acts", 2), 9)
    report = repair(toy_request(), tabled, tabled.path.parent)
    assert report.repaired == [2] and not check_store(tabled.path, data=True).findings


def test_a_store_is_read_through_a_few_maps_and_verified_once_a_file(toy_request, small_groups, monkeypatch):
    request = toy_request()
    store = open_store(capture(request)[0], request.stores)
    whole, order = np.array(store[:]), [0, 1, 2, 0, 2, 1, 0]
    monkeypatch.setattr("actstore.reader.MAX_MAPS", 1)
    store, read = reopened(store), []
    durable.step_hook = lambda name, path: read.append(path) if name == "read" and "row_groups" in str(path) else None
    for group in order:
        np.testing.assert_array_equal(store.chunk("acts", group), whole[group * 1024 : (group + 1) * 1024])
    assert len(read) == 3 and len(store._maps) == 1  # records are read to verify: each row group once
    durable.step_hook = None
    path = writable(store) / chunk_name("acts", 2)
    flip(path, 5)  # another content under the name, after it was verified
    with pytest.raises(StoreDamaged):
        store.chunk("acts", 2)


def interrupted(request, at: str) -> None:
    """Capture until the first file whose name ends so is renamed to its place."""

    def stop(name: str, path: object) -> None:
        if name == "rename" and str(path).endswith(at):
            raise OSError(5, "stopped here")

    durable.step_hook = stop
    with pytest.raises(StorageFailed):
        capture(request)
    durable.step_hook = None


@pytest.mark.parametrize("at", [GROUPS, "acts/zarr.json", "manifest.json"])
def test_a_seal_of_format_2_that_was_interrupted_is_done_again(toy_request, small_groups, monkeypatch, at):
    monkeypatch.setattr("actstore.manifest.MAX_LISTED_GROUPS", 2)
    request = toy_request()
    interrupted(request, at)
    store = open_store(capture(request)[0], request.stores)
    assert store.manifest.format == 2 and not check_store(store.path, data=True).findings


def test_a_record_lost_before_the_seal_is_no_sealed_store(toy_request, small_groups):
    request = toy_request()
    interrupted(request, "vocabulary.json")
    (digest,) = os.listdir(request.stores / ".staging")
    partial = open_partial(digest, request.stores)
    writer = open_writer(StorePaths(request.stores, digest), partial.key, partial.rows, partial.d_model, shared=True)
    assert not writer.missing_row_groups() and all(isinstance(d, str) for d in writer.committed.values())
    durable.remove_file(writer.paths.staging / record_name(1))
    with pytest.raises(StorageFailed, match="row group 1"):
        seal(writer, {"tokens": [], "special": []}, {})
    again = StoreWriter(writer.paths, writer.key, writer.rows, writer.d_model)
    again.look_again()
    assert again.missing_row_groups() == [1]
    assert not check_store(open_store(capture(request)[0], request.stores).path, data=True).findings
