"""Promise 13. A repair computes just the damaged row groups and accepts them only if the recorded digest returns."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from helpers import TINY, words, write_jsonl

from actstore import digests, durable
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.check import check_store
from actstore.errors import KeyMismatch, StoreLocked, UsageError
from actstore.layout import StorePaths, chunk_name, record_name
from actstore.reader import Store, open_unchecked
from actstore.repair import RepairReport, repair, request_of


@pytest.fixture
def stored(toy_request, monkeypatch) -> tuple[CaptureRequest, Store]:
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)
    request = toy_request(rows=3500)
    return request, open_store(capture(request)[0], request.stores)


def mended(request: CaptureRequest, store: Store) -> RepairReport:
    return repair(request, open_unchecked(store.path), store.path.parent)


def identity(path: Path) -> tuple[int, int]:
    """A file's inode and time of change: a new file may get the inode of one just deleted."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns


def flip(path: Path, at: int = 200) -> None:
    os.chmod(path, 0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def to_link(path: Path) -> None:
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"")


def swap(path: Path) -> None:
    other = path.parent / path.name.replace("1", "2")
    a, b = path.read_bytes(), other.read_bytes()
    for target, data in ((path, b), (other, a)):
        target.unlink()
        target.write_bytes(data)


DAMAGES = {
    "flip": flip, "cut": lambda p: os.truncate(p, 100), "deleted": Path.unlink, "link": to_link, "folder": to_folder,
    "swapped with its neighbour": swap,
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [chunk_name("acts", 1), chunk_name("tokens", 1), record_name(1)])
def test_a_damaged_row_group_comes_back_bit_for_bit_and_nothing_else_is_touched(stored, name, how):
    request, store = stored
    names = [p.relative_to(store.path) for p in sorted(store.path.rglob("*")) if p.is_file()]
    before = {n: (store.path / n).read_bytes() for n in names}
    identities = {n: identity(store.path / n) for n in names}
    DAMAGES[how](store.path / name)
    assert check_store(store.path, data=True).findings
    report = mended(request, store)
    groups = {1, 2} if how.startswith("swapped") else {1}
    assert set(report.damaged) == set(report.repaired) == groups and not report.refused
    assert {n: (store.path / n).read_bytes() for n in names} == before
    touched = {n for n in names if identity(store.path / n) != identities[n]}
    files = {"acts/c.{}.0", "tokens/c.{}", "documents/c.{}", "positions/c.{}", "row_groups/{}.json"}
    assert {str(n) for n in touched} == {f.format(g) for f in files for g in groups}
    assert not check_store(store.path, data=True).findings
    assert mended(request, store).damaged == []  # and a whole store costs no model


@pytest.mark.parametrize("name", ["key.json", "zarr.json", "acts/zarr.json", "vocabulary.json"])
def test_a_damaged_small_file_comes_back(stored, name):
    request, store = stored
    before = (store.path / name).read_bytes()
    flip(store.path / name, at=10)
    assert mended(request, store).files == [name]
    assert (store.path / name).read_bytes() == before and not check_store(store.path, data=True).findings


def test_a_group_that_comes_out_different_is_refused_naming_the_first_row(toy_request, make_corpus):
    """Fault 38: the toy model gives other numbers for byte 3 in every run."""
    corpus = make_corpus(["plain text " * 20, "x" * 50 + "\x03" + "y" * 500], "wild.jsonl")
    request = toy_request(corpus=(corpus,), bos=False, packing="truncate", seq_len=600)
    store = open_store(capture(request)[0], request.stores)
    path = store.path / chunk_name("acts", 0)
    flip(path, at=8)
    damaged = path.read_bytes()
    report = mended(request, store)
    assert report.repaired == [] and len(report.refused) == 1
    assert "the first is row 0" in report.refused[0]
    assert path.read_bytes() == damaged  # nothing changed


def test_control_without_the_comparison_another_result_would_be_taken(toy_request, make_corpus, monkeypatch):
    corpus = make_corpus(["plain text " * 20, "x" * 50 + "\x03" + "y" * 500], "wild.jsonl")
    request = toy_request(corpus=(corpus,), bos=False, packing="truncate", seq_len=600)
    store = open_store(capture(request)[0], request.stores)
    flip(store.path / chunk_name("acts", 0))
    monkeypatch.setattr("actstore.writer.group_digest", lambda group: store.manifest.groups[group.index])
    assert mended(request, store).repaired == [0]
    assert check_store(store.path, data=True).findings


def test_another_model_corpus_or_setting_is_a_mismatch_that_names_the_field(stored, toy_request, make_corpus):
    """Fault 25."""
    _, store = stored
    flip(store.path / chunk_name("acts", 1))
    for field, other in {
        "corpus": {"corpus": (make_corpus(words(60, seed=1), "other.jsonl"),)},
        "model": {"model": "toy:8"},
        "dtype": {"dtype": "float16"},
        "sequences": {"seq_len": 31},
    }.items():
        with pytest.raises(KeyMismatch, match=field) as caught:
            mended(toy_request(rows=3500, **other), store)
        assert field in caught.value.where
    assert check_store(store.path, data=True).damaged == [1]


def test_a_repair_waits_for_nobody_and_disturbs_nobody(stored):
    from actstore import durable

    request, store = stored
    flip(store.path / chunk_name("acts", 1))
    lock = StorePaths(store.path.parent, store.digest).lock
    with durable.lock(lock, "", shared=True), pytest.raises(StoreLocked, match="pid"):
        mended(request, store)


def test_the_key_says_everything_but_where_model_and_corpus_lie(stored):
    request, store = stored
    flip(store.path / chunk_name("acts", 0))
    with pytest.raises(UsageError, match="local files"):
        request_of(store, None, (), request.stores)
    asked = request_of(store, None, request.corpus, request.stores)
    assert mended(asked, store).repaired == [0]


def test_a_real_model_repairs_its_store(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 192 * 2)
    request = CaptureRequest(
        model=str(TINY), hooks=("blocks.1.hook_resid_pre",), corpus=(tiny_corpus,), rows=2500, dtype="float16", stores=tmp_path
    )
    store = open_store(capture(request)[0], tmp_path)
    flip(store.path / chunk_name("acts", 1))
    with pytest.raises(UsageError, match="model folder"):
        request_of(store, None, (tiny_corpus,), tmp_path)
    assert mended(request_of(store, str(TINY), (tiny_corpus,), tmp_path), store).repaired == [1]
    assert not check_store(store.path, data=True).findings


def test_a_damaged_manifest_is_never_rebuilt(stored):
    from actstore.errors import FormatError

    _, store = stored
    flip(store.path / "manifest.json")
    with pytest.raises(FormatError):
        open_unchecked(store.path)


def test_a_copy_of_a_store_can_be_repaired_elsewhere(stored, tmp_path):
    _, store = stored
    corpus = write_jsonl(tmp_path / "moved.jsonl", words(60))
    moved = tmp_path / "other" / store.digest
    shutil.copytree(store.path, moved)
    (moved / chunk_name("tokens", 2)).unlink()
    report = repair(request_of(open_unchecked(moved), None, (corpus,), moved.parent), open_unchecked(moved), moved.parent)
    assert report.repaired == [2] and not check_store(moved, data=True).findings


def test_nothing_that_an_interrupted_repair_has_left_is_believed(stored):
    """A byte of its scratch place changes, or it was computed elsewhere: the next repair computes it again."""
    request, store = stored
    flip(store.path / chunk_name("acts", 1))
    scratch = StorePaths(store.path.parent, store.digest).scratch

    def stop_before_the_first_move(name: str, path: Path) -> None:
        if name == "rename" and path == store.path / chunk_name("acts", 1):
            raise KeyboardInterrupt

    durable.step_hook = stop_before_the_first_move
    with pytest.raises(KeyboardInterrupt):
        mended(request, store)
    durable.step_hook = None
    flip(scratch.staging / chunk_name("tokens", 1), 40)
    scratch.sealed.mkdir(parents=True)  # as if that store had been sealed
    assert mended(request, store).repaired == [1]
    assert not check_store(store.path, data=True).findings


def test_a_file_in_the_place_of_an_array_is_replaced(stored):
    request, store = stored
    shutil.rmtree(store.path / "acts")
    (store.path / "acts").write_bytes(b"")
    report = mended(request, store)
    assert report.repaired == [0, 1, 2, 3] and report.files == ["acts/zarr.json"]
    assert not check_store(store.path, data=True).findings


def test_a_chunk_that_cannot_be_read_is_damage_like_any_other(stored):
    request, store = stored
    bad = (store.path / chunk_name("acts", 1)).stat().st_ino
    real = digests.open if hasattr(digests, "open") else open

    class Unreadable:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def read(self, n):
            if os.fstat(self.file.fileno()).st_ino == bad:
                raise OSError(errno.EIO, "Input/output error")
            return self.file.read(n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "open", Unreadable, raising=False)
        assert check_store(store.path, data=True).findings == ["chunk acts/c.1.0: read failed: Input/output error"]
        assert mended(request, store).repaired == [1]
    assert not check_store(store.path, data=True).findings
