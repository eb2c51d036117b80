"""Stores in a bucket read through a bounded folder: verified, fetched once, never more than the bound on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import flip

from actstore.bucket import open_bucket
from actstore.cache import Cache
from actstore.capture import capture
from actstore.catalog import open_store
from actstore.errors import StoreDamaged, UsageError
from actstore.layout import chunk_name
from actstore.remote import push
from trainer import FitConfig, fit, load_sae

CHUNK = 1024 * 16 * 4 + 4


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


@pytest.fixture
def shared(toy_request, tmp_path):
    """A store of six row groups, and its address in a folder that stands for a bucket."""
    store = open_store(capture(toy_request(rows=6000))[0], toy_request().stores)
    url = f"file://{tmp_path}/bucket"
    push(store, open_bucket(url, make=True))
    return store, f"{url}#{store.digest[:8]}"


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "tmp" not in p.parts)


def test_rows_come_once_and_stay(toy_request, proxy, tmp_path):
    store = open_store(capture(toy_request(rows=4500, dtype="int8"))[0], toy_request().stores)
    push(store, open_bucket(proxy.place))
    for again in (False, True):
        proxy.seen.clear()
        with Cache(tmp_path / "cache") as cache:
            there = cache.open(f"{proxy.place}#{store.digest[:8]}")
            assert np.array_equal(there[100:4400], store[100:4400])
            rows = np.arange(0, 4500, 7)
            assert np.array_equal(there.take("acts", rows), store.take("acts", rows))
            assert np.array_equal(there.read("documents", 0, 4500), store.read("documents", 0, 4500))
            assert there.vocabulary == store.vocabulary and there.content_digest == store.content_digest
        assert proxy.moved("GET", "/c.") == (0 if again else 5 * len(store.manifest.groups))


def test_the_bound_holds_and_what_is_mapped_stays_readable(shared, tmp_path):
    store, address = shared
    limit = 3 * CHUNK + 120_000  # and the small files
    with Cache(tmp_path / "cache", limit) as cache:
        there = cache.open(address)
        first = there[0:64]
        for group in (1, 2, 3, 4, 5, 0, 3):
            there.take("acts", np.arange(group * 1024, group * 1024 + 50))
            assert on_disk(tmp_path / "cache") <= limit
            assert (there.path / chunk_name("acts", group)).exists()
        assert np.array_equal(first, store[0:64])  # its file went, its map did not


def test_a_cache_that_cannot_hold_two_windows_says_so(shared, tmp_path):
    _, address = shared
    with Cache(tmp_path / "cache", 4 * CHUNK) as cache, pytest.raises(UsageError, match="cache may hold"):
        cache.open(address).take("acts", np.arange(0, 6000))


def test_what_is_wanted_comes_before_it_is_asked_for(shared, tmp_path):
    _, address = shared
    with Cache(tmp_path / "cache") as cache:
        there = cache.open(address)
        there.want("acts", [4, 5])
        cache._pool.shutdown(wait=True)
        assert [(there.path / chunk_name("acts", g)).exists() for g in range(6)] == [False] * 4 + [True] * 2


def test_no_damaged_chunk_reaches_a_reader(shared, tmp_path):
    store, address = shared
    path = tmp_path / "bucket" / store.digest / chunk_name("acts", 1)
    with Cache(tmp_path / "cache") as cache:
        there = cache.open(address)
        whole = path.read_bytes()
        for data in (whole[:-1], whole[:9] + b"x" + whole[10:]):
            path.unlink()
            path.write_bytes(data)
            with pytest.raises(StoreDamaged, match=r"acts/c\.1\.0"):
                there[1024:1030]
            assert not (there.path / chunk_name("acts", 1)).exists()
        path.unlink()
        with pytest.raises(StoreDamaged, match="missing"):
            there[1024:1030]
        path.write_bytes(whole)
        assert np.array_equal(there[1024:1030], store[1024:1030])
        with pytest.raises(UsageError, match="no zarr array"):
            _ = there.acts


def test_a_chunk_that_the_cache_s_disk_changed_is_fetched_again(shared, tmp_path):
    store, address = shared
    with Cache(tmp_path / "cache") as cache:
        cached = cache.open(address)
        cached.take("acts", np.arange(10))
        path = cached.path / chunk_name("acts", 0)
    os.chmod(path, 0o644)
    flip(path, 77)
    (cached.path / "tmp" / "left-over").write_bytes(b"x")
    with Cache(tmp_path / "cache") as cache:
        assert np.array_equal(cache.open(address)[0:1024], store[0:1024])
        assert not (cached.path / "tmp" / "left-over").exists()


def test_a_fit_from_a_bucket_is_the_fit_from_disk_bit_for_bit(shared, tmp_path):
    store, address = shared
    config = FitConfig(n_latents=(32,), k=(4,), batch_size=256, epochs=2, shuffle="chunks", skip_positions=1)
    (local,) = fit(store, config, tmp_path / "local")
    with Cache(tmp_path / "cache") as cache:
        (remote,) = fit(cache.open(address), config, tmp_path / "remote")
    assert remote.digest == local.digest and remote.metrics == local.metrics
    ours, theirs = (load_sae(r.digest, tmp_path / f).state_dict() for r, f in ((local, "local"), (remote, "remote")))
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
