"""Writer, manifest, reader and check together, on a small real store: what is promised, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zarr
from helpers import flip, hostile, reopened, writable
from zarr.codecs import BytesCodec, VLenBytesCodec
from zarr.codecs.crc32c_ import Crc32cCodec
from zarr.core.dtype import VariableLengthBytes

from actstore import durable
from actstore.bfloat16 import BFloat16  # zarr reads the type once this is imported
from actstore.capture import Progress, capture
from actstore.catalog import find_digest, list_stores, open_store, remove_store
from actstore.check import check_store
from actstore.digests import sha256_bytes
from actstore.errors import (
    FormatError,
    NonFiniteActivation,
    StorageFailed,
    StoreDamaged,
    StoreLocked,
    StoreNotFound,
    StoreNotSealed,
    UsageError,
)  # fmt: skip
from actstore.key import StoredDtype, dump_key, parse_key, store_digest
from actstore.layout import StorePaths, arrays_of, chunk_name
from actstore.limits import MAX_KEY_BYTES
from actstore.manifest import content_digest, parse_manifest
from actstore.mapped import _crc32c
from actstore.pipeline import to_stored
from actstore.reader import open_folder
from actstore.writer import open_writer, put_rows, writing
from actstore.zarr_array import array_metadata, array_shape, chunk_shape, numpy_dtype


def test_zarr_reads_the_same_rows(toy_store):
    group = zarr.open_group(toy_store.path, mode="r")
    np.testing.assert_array_equal(group["acts"][:], toy_store[:])
    for array in ("tokens", "documents", "positions"):
        np.testing.assert_array_equal(group[array][:], toy_store.read(array, 0, toy_store.rows))
    assert group.attrs["actstore"]["content_digest"] == toy_store.content_digest
    assert toy_store.acts.shape == (toy_store.rows, 16)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_round_trips_through_us_and_zarr(toy_request, dtype):
    request = toy_request(dtype=dtype)
    store = open_store(capture(request)[0], request.stores)
    exact = open_store(capture(toy_request())[0], request.stores)[:]
    np.testing.assert_array_equal(store[:], exact.astype(store[:1].dtype))
    assert (store[:] < 0).any()  # negative values are what other people's bfloat16 stores lost
    read = zarr.open_group(store.path, mode="r")["acts"]
    np.testing.assert_array_equal(read[:].view(np.uint8), store[:].view(np.uint8))
    assert str(read.dtype) == dtype


def test_a_slice_is_a_view_of_the_map_and_cannot_be_written(toy_store):
    rows = toy_store[3:9]
    assert rows.shape == (6, 16) and not rows.flags.writeable and not rows.flags.owndata
    assert toy_store[toy_store.rows - 1 : toy_store.rows + 50].shape == (1, 16)
    assert toy_store[5:5].shape == (0, 16)
    np.testing.assert_array_equal(toy_store.take("acts", np.array([2, 7, 7, 11])), toy_store[:][[2, 7, 7, 11]])


def test_rows_across_row_groups_join(toy_request, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)
    request = toy_request()
    store = open_store(capture(request)[0], request.stores)
    assert len(store.manifest.groups) > 2
    whole = np.concatenate([store.chunk("acts", g) for g in range(len(store.manifest.groups))])
    np.testing.assert_array_equal(store[1000:2100], whole[1000:2100])
    rows = np.array([0, 1023, 1024, 2047, store.rows - 1])
    np.testing.assert_array_equal(store.take("acts", rows), whole[rows])
    np.testing.assert_array_equal(zarr.open_group(store.path, mode="r")["acts"][:], whole)


def test_the_statistics_are_those_of_the_rows(toy_store):
    x = toy_store[:].astype(np.float64)
    np.testing.assert_allclose(toy_store.statistics.mean, x.mean(0), rtol=1e-9)
    assert toy_store.statistics.total_variance == pytest.approx(x.var(0).sum())


def test_the_key_names_the_folder_and_round_trips(toy_store):
    data = (toy_store.path / "key.json").read_bytes()
    assert parse_key(data) == toy_store.key and dump_key(toy_store.key) == data
    assert sha256_bytes(data) == toy_store.digest == toy_store.path.name == store_digest(toy_store.key)


def test_every_choice_that_changes_rows_changes_the_digest(toy_request, make_corpus):
    base = toy_request()
    changes = [
        {"seq_len": 33}, {"packing": "truncate"}, {"bos": False}, {"rows": 100}, {"dtype": "float16"}, {"center": True},
        {"hooks": ("hook_embed",)}, {"model": "toy:8"}, {"max_documents": 5}, {"bad_lines": "skip"},
        {"corpus": (make_corpus(["other text " * 30], "other.jsonl"),)},
    ]  # fmt: skip
    digests = [capture(r)[0] for r in (base, *(toy_request(**c) for c in changes))]
    assert len(set(digests)) == len(digests)
    assert capture(toy_request(batch_tokens=64)) == digests[:1]  # a choice that does not


@pytest.mark.parametrize("array", arrays_of("float32"))
def test_a_flipped_bit_is_found_and_never_served(toy_store, array):
    path = writable(toy_store) / chunk_name(array, 0)
    flip(path, 17)
    store = reopened(toy_store)
    with pytest.raises(StoreDamaged, match="crc32c"):
        store.read(array, 0, 1)
    assert len(check_store(store.path, data=True).findings) == 1
    assert not check_store(store.path, data=False).findings  # the control: sizes alone do not show it


def test_control_without_the_check_the_flipped_bit_is_served(toy_store, monkeypatch):
    path = writable(toy_store) / chunk_name("acts", 0)
    before = toy_store[:].copy()
    flip(path, 18)
    record = toy_store.record(0).chunks["acts"].crc32c
    monkeypatch.setattr("actstore.mapped._crc32c", lambda descriptor, size: record)
    assert (reopened(toy_store)[:] != before).any()


def test_padding_is_covered_too(toy_store):
    path = writable(toy_store) / chunk_name("acts", 0)
    flip(path, path.stat().st_size - 5)
    with pytest.raises(StoreDamaged):
        reopened(toy_store)[:1]


@pytest.mark.parametrize("damage", ["delete", "cut", "longer", "empty", "zeros", "link"])
def test_a_wrong_chunk_file_is_an_error_not_zeros(toy_store, damage):
    path = writable(toy_store) / chunk_name("acts", 0)
    data = path.read_bytes()
    path.unlink()
    match damage:
        case "cut":
            path.write_bytes(data[:-100])
        case "longer":
            path.write_bytes(data + b"\0")
        case "empty":
            path.write_bytes(b"")
        case "zeros":
            path.write_bytes(b"\0" * len(data))
        case "link":
            (toy_store.path.parent / "elsewhere").write_bytes(data)
            path.symlink_to(toy_store.path.parent / "elsewhere")
    with pytest.raises((StoreDamaged, FormatError)):
        reopened(toy_store)[:1]
    assert check_store(toy_store.path, data=True).findings


def test_swapped_and_foreign_chunks_are_found(toy_request, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)
    request = toy_request(hooks=("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"))
    store, other = (open_store(d, request.stores) for d in capture(request))
    a, b = (writable(store) / chunk_name("acts", i) for i in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)
    with pytest.raises(StoreDamaged):
        reopened(store)[:1]
    assert len(check_store(store.path, data=True).findings) == 2
    b.write_bytes(second)
    a.write_bytes((other.path / chunk_name("acts", 0)).read_bytes())
    assert len(check_store(store.path, data=True).findings) == 1
    (store.path / "extra").write_bytes(b"")
    (store.path / "row_groups" / "1.json").unlink()
    assert len(check_store(store.path, data=True).findings) == 3


@pytest.mark.parametrize(
    "name", ["manifest.json", "key.json", "zarr.json", "acts/zarr.json", "vocabulary.json", "row_groups/0.json"]
)
def test_a_flip_anywhere_in_a_small_file_is_found(toy_store, name):
    path = writable(toy_store) / name
    data = path.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 60)):
        flip(path, at)
        with pytest.raises((FormatError, StoreDamaged)):
            reopened(toy_store)[:1]
        path.write_bytes(data)
    reopened(toy_store)[:1]


def test_a_store_without_manifest_or_under_another_name_is_refused(toy_store):
    path = writable(toy_store)
    moved = path.parent / ("0" * 64)
    path.rename(moved)
    with pytest.raises(FormatError, match="name"):
        open_folder(moved)
    (moved / "manifest.json").unlink()
    with pytest.raises(StoreNotSealed):
        open_folder(moved)


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 10**15}, {"rows": -1}, {"rows": 1.5}, {"rows": True}, {"rows": "5"}, {"format": 2}, {"format": 0},
        {"groups": []}, {"groups": ["x"]}, {"group_rows": 3}, {"d_model": 0}, {"extra": 1}, {"content_digest": "0" * 64},
        {"statistics": {}}, {"store": "../../../etc/passwd"}, {"key": {}},
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused_by_field(toy_store, fields):
    with pytest.raises(FormatError):
        parse_manifest(hostile(toy_store.manifest, **fields))


def test_files_outside_the_store_are_not_named_by_a_manifest(toy_store):
    path = writable(toy_store)
    files = {**toy_store.manifest.files, "../../secret": "0" * 64}
    (path / "manifest.json").write_bytes(hostile(toy_store.manifest, files=files))
    with pytest.raises(FormatError, match="exactly the files"):
        reopened(toy_store)


def test_a_foreign_codec_is_never_opened(toy_store):
    path = writable(toy_store)
    metadata = json.loads((path / "acts" / "zarr.json").read_text())
    metadata["codecs"] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "gzip", "configuration": {"level": 1}},
    ]
    data = json.dumps(metadata).encode()
    (path / "acts" / "zarr.json").write_bytes(data)
    files = {**toy_store.manifest.files, "acts/zarr.json": sha256_bytes(data)}
    (path / "manifest.json").write_bytes(hostile(toy_store.manifest, files=files))
    with pytest.raises(FormatError, match="codecs"):
        _ = reopened(toy_store).acts


@pytest.mark.parametrize("byte, dtype, reason", [("\x01", "float32", "nan"), ("\x02", "float16", "float16")])
def test_non_finite_values_never_enter_a_store(toy_request, make_corpus, byte, dtype, reason):
    corpus = make_corpus(["fine text here " * 20, "a" * 100 + byte + "b" * 300], "bad.jsonl")
    request = toy_request(corpus=(corpus,), dtype=dtype)
    with pytest.raises(NonFiniteActivation, match=reason) as caught:
        capture(request)
    assert "row" in caught.value.where
    assert not any(line.sealed for line in list_stores(request.stores))


def test_65504_fits_float16_and_65520_does_not():
    from actstore.pipeline import to_stored

    assert to_stored(np.array([[65504.0]], np.float32), "float16", "h", 0).tolist() == [[65504.0]]
    with pytest.raises(NonFiniteActivation, match="65520"):
        to_stored(np.array([[65520.0]], np.float32), "float16", "h", 0)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


def test_resume_computes_only_the_missing_row_groups(toy_request, small_groups):
    request = toy_request(batch_tokens=320)  # batches straddle row groups
    rows: list[int] = []

    class StopError(Exception):
        pass

    def count(n: int) -> None:
        rows.append(n)
        if sum(rows) > 2500:
            raise StopError

    with pytest.raises(StopError):
        capture(request, Progress(on_rows=count))
    committed = list_stores(request.stores)[0].committed
    assert committed == 2
    plans = []
    digest = capture(request, Progress(on_plan=plans.append))[0]
    store = open_store(digest, request.stores)
    assert plans[0].needed_bytes < store.bytes
    assert (
        store.content_digest
        == open_store(capture(toy_request(stores=request.stores / "b", batch_tokens=320))[0], request.stores / "b").content_digest
    )
    done = []
    assert capture(request, Progress(on_plan=done.append)) == [digest] and not done  # asking again is free


def change(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def to_link(path: Path) -> None:
    path.rename(path.parents[4] / "outside")
    path.symlink_to(path.parents[4] / "outside")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


LITTER = {
    "a chunk is a link": lambda folder: to_link(folder / "acts" / "c.0.0"),
    "a chunk is a folder": lambda folder: to_folder(folder / "acts" / "c.0.0"),
    "a record is a folder": lambda folder: to_folder(folder / "row_groups" / "0.json"),
    "acts is a link": lambda folder: to_link(folder / "acts"),
    "acts is a file": lambda folder: to_file(folder / "acts"),
    "the key is cut": lambda folder: change(folder / "key.json", b"{"),
    "the key is a pipe": lambda folder: ((folder / "key.json").unlink(), os.mkfifo(folder / "key.json")),
}


@pytest.mark.parametrize("how", LITTER)
def test_whatever_lies_in_an_unsealed_store_it_is_sealed_whole_or_not_at_all(toy_request, small_groups, how):
    """Complete but for its seal, then changed by another hand: the same command seals what it wrote itself."""

    def stop_before_the_seal(name: str, path: Path) -> None:
        if name == "rename" and path.name == "vocabulary.json":
            raise KeyboardInterrupt

    request = toy_request(rows=2048)
    durable.step_hook = stop_before_the_seal
    with pytest.raises(KeyboardInterrupt):
        capture(request)
    durable.step_hook = None
    (folder,) = (request.stores / ".staging").iterdir()
    LITTER[how](folder)
    (digest,) = capture(request)
    assert not check_store(request.stores / digest, data=True).findings


@pytest.mark.parametrize("left", [(), ("key.json", "acts")])
def test_half_a_copy_is_no_finished_store(toy_store, toy_request, left):
    for path in writable(toy_store).iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StoreDamaged, match="no manifest") as caught:
        capture(toy_request())
    assert f"actstore rm {toy_store.digest[:12]}" in caught.value.do
    remove_store(toy_store.digest, toy_store.path.parent)
    assert capture(toy_request()) == [toy_store.digest]


def test_two_hook_points_in_one_pass_equal_two_passes(toy_request, tmp_path, small_groups):
    hooks = ("blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post")
    together = toy_request(hooks=hooks)
    stores = [open_store(d, together.stores) for d in capture(together)]
    for hook, store in zip(hooks, stores, strict=True):
        alone = toy_request(hooks=(hook,), stores=tmp_path / "alone")
        assert open_store(capture(alone)[0], alone.stores).content_digest == store.content_digest
    assert stores[1].d_model == 4 * stores[0].d_model and stores[0].rows == stores[1].rows
    np.testing.assert_array_equal(stores[0].read("tokens", 0, 500), stores[1].read("tokens", 0, 500))


def test_a_second_writer_is_refused_and_a_reader_sees_an_unsealed_store(toy_request, small_groups):
    request = toy_request()
    seen = []

    def look(rows: int) -> None:
        if not seen:
            digest = list_stores(request.stores)[0].digest
            for job in (
                lambda: capture(request),
                lambda: open_store(digest[:12], request.stores),
                lambda: remove_store(digest, request.stores),
            ):
                with pytest.raises((StoreLocked, StoreNotSealed)) as caught:
                    job()
                seen.append(type(caught.value).__name__)

    capture(request, Progress(on_rows=look))
    assert seen == ["StoreLocked", "StoreNotSealed", "StoreLocked"]


# --- catalog ----------------------------------------------------------------------------------------------------------


def test_prefixes_find_stores_and_ambiguous_ones_are_listed(toy_store, tmp_path):
    stores = toy_store.path.parent
    assert find_digest(toy_store.digest[:6], stores) == toy_store.digest
    with pytest.raises(StoreNotFound):
        find_digest("0" * 10, stores)
    twin = toy_store.digest[:6] + "0" * 58
    (stores / twin).mkdir()
    with pytest.raises(UsageError, match="ambiguous"):
        find_digest(toy_store.digest[:6], stores)
    assert [line.problem != "" for line in list_stores(stores)].count(True) == 1


def test_a_key_of_impossible_size_is_refused_unread():
    with pytest.raises(FormatError, match="at most"):
        parse_key(b" " * (MAX_KEY_BYTES + 1))


def test_a_manifest_with_more_row_groups_than_rows_is_refused(toy_store):
    groups = [*toy_store.manifest.groups, "0" * 64]
    digest = content_digest(toy_store.key, toy_store.rows, groups)
    with pytest.raises(FormatError, match="cannot hold"):
        parse_manifest(hostile(toy_store.manifest, groups=groups, content_digest=digest))


def test_a_chunk_cut_after_the_store_was_opened_is_found_at_first_touch(toy_store):
    chunk = writable(toy_store) / chunk_name("acts", 0)
    with open(chunk, "r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreDamaged, match="bytes"):
        toy_store[0:1]
    with open(chunk, "rb") as file:  # and a file that shrinks between the look at its size and the reading is no endless loop
        assert _crc32c(file.fileno(), 10**6) == _crc32c(file.fileno(), 100)


def test_a_slice_with_a_step_is_refused(toy_store):
    with pytest.raises(IndexError, match="take"):
        toy_store[::2]


def test_a_store_sealed_meanwhile_is_not_written_again(toy_store):
    paths = StorePaths(toy_store.path.parent, toy_store.digest)
    with pytest.raises(StoreLocked, match="sealed"), writing(paths):
        raise AssertionError("let in")
    writer = open_writer(paths, toy_store.key, toy_store.rows, toy_store.d_model)
    assert not paths.staging.exists() and writer.try_claim(0) is None


def test_a_row_group_is_claimed_by_one_and_not_again_once_committed(toy_store, tmp_path):
    paths, rows = StorePaths(tmp_path / "others", toy_store.digest), toy_store.rows
    first, second = (open_writer(paths, toy_store.key, rows, 16, shared=True) for _ in range(2))
    claim = first.try_claim(0)
    assert claim is not None and second.try_claim(0) is None
    acts = to_stored(toy_store[:], "float32", toy_store.key.hook, 0)
    put_rows(first, 0, acts, *(toy_store.read(a, 0, rows) for a in ("tokens", "documents", "positions")))
    claim.close()
    assert second.try_claim(0) is None and 0 in second.committed


@pytest.mark.parametrize("n", range(2))
def test_a_failing_read_of_a_chunk_or_of_its_trailer_is_an_error_of_the_disk(toy_store, monkeypatch, n):
    real, calls = os.pread, []

    def pread(descriptor: int, size: int, at: int) -> bytes:
        calls.append(size)
        if len(calls) == n + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size, at)

    monkeypatch.setattr("os.pread", pread)
    with pytest.raises(StorageFailed, match="Input/output error"):
        toy_store[0:1]
    assert len(calls) == n + 1


@pytest.mark.parametrize("dtype", get_args(StoredDtype))
def test_our_metadata_is_byte_for_byte_what_zarr_writes(dtype):
    memory = {}
    attributes = {"actstore": {"about": "a store", "mean_norm": 1.5}}
    group = zarr.create_group(zarr.storage.MemoryStore(memory), attributes=attributes, zarr_format=3)
    # zarr finds registered types by name when it reads, but not by numpy dtype when it writes
    special = {"exact": VariableLengthBytes(), "acts": BFloat16() if dtype == "bfloat16" else np.dtype(dtype)}
    for array in arrays_of(dtype):
        fill = b"" if array == "exact" else -128 if (array, dtype) == ("acts", "int8") else np.nan
        with warnings.catch_warnings():  # about zarr's own name of `bytes`, which is replaced below
            warnings.simplefilter("ignore")
            group.create_array(
                array,
                shape=array_shape(array, 1500, 1024, 16),
                chunks=chunk_shape(array, 1024, 16),
                dtype=special.get(array, numpy_dtype(array, dtype)),
                fill_value=-1 if numpy_dtype(array, dtype) == np.int32 else fill,
                serializer=VLenBytesCodec() if array == "exact" else BytesCodec(endian="little"),
                compressors=[Crc32cCodec()],
                filters=None,
                chunk_key_encoding={"name": "default", "separator": "."},
            )
    ours = array_metadata(1500, 16, dtype, 1024, attributes)
    assert set(ours) == {"zarr.json", *(f"{array}/zarr.json" for array in arrays_of(dtype))}
    for name, data in ours.items():
        # zarr 3.1.6 reads the registered name `bytes`, and writes its own
        assert memory[name].to_bytes().replace(b'"variable_length_bytes"', b'"bytes"') == data, name
