"""Captures straight into a bucket: any number of workers, killed, asleep or late; what is committed never changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import words, write_jsonl

from actstore import bucket_writer
from actstore.arrivals import list_remote, remote_manifest
from actstore.backends.toy import ToyBackend
from actstore.bucket import Bucket, create_object, delete_objects, list_objects, open_bucket, read_object, write_object
from actstore.bucket_writer import BucketWriter
from actstore.capture import CaptureRequest, Progress, StoppedError, capture
from actstore.catalog import open_store
from actstore.check import check_store
from actstore.errors import StorageFailed, StoreDamaged
from actstore.forecast import forecast
from actstore.layout import MANIFEST, chunk_name, record_name
from actstore.manifest import group_digest
from actstore.places import BucketPlace
from actstore.reader import Store
from actstore.remote import pull
from actstore.writer import put_rows

SMALL = 1024 * 16 * 4
ARRAYS = ("tokens", "documents", "positions")


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", SMALL)
    monkeypatch.setattr(bucket_writer, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(bucket_writer, "LEASE_SECONDS", 0.8)
    monkeypatch.setattr("actstore.fill.WAIT_SECONDS", 0.05)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", words(60))


@pytest.fixture(scope="module")
def local(corpus) -> Store:
    """Five row groups, the last one short, captured on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.manifest.MAX_CHUNK_BYTES", SMALL)
        return open_store(capture(asked(corpus, corpus.parent / "stores"))[0], corpus.parent / "stores")


def asked(corpus: Path, stores: Path | str, **fields) -> CaptureRequest:
    return CaptureRequest(
        "toy:16", ("blocks.0.hook_resid_pre",), (corpus,), seq_len=32, rows=4500, backend="toy", stores=stores, batch_tokens=256,
        **fields,
    )  # fmt: skip


def objects(url: str, folder: str) -> dict[str, bytes]:
    bucket = open_bucket(url)
    return {name: bytes(read_object(bucket, f"{folder}/{name}", 1 << 20)) for name, _ in list_objects(bucket, folder)}


def assert_same(url: str, local: Store, folder: Path) -> None:
    """The bucket has what a capture on disk has, but for the provenance, nothing else, and it comes back as a sound store."""
    there = objects(url, local.digest)
    here = {str(p.relative_to(local.path)): p.read_bytes() for p in local.path.rglob("*") if p.is_file()}
    assert {n: d for n, d in there.items() if n != MANIFEST} == {n: d for n, d in here.items() if n != MANIFEST}
    assert there.keys() == here.keys() and not objects(url, ".staging")
    pull(open_bucket(url), local.digest, folder)
    assert not check_store(folder / local.digest, data=True).findings
    assert open_store(local.digest, folder).content_digest == local.content_digest


def in_threads(*works: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads), errors


def test_workers_without_a_disk_make_the_store_of_a_capture_on_disk(corpus, local, proxy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_threads(*(lambda i=i: capture(asked(corpus, proxy.place, workers=3, rank=i)) for i in range(3)))
    assert not list(tmp_path.iterdir())
    assert_same(proxy.place, local, tmp_path / "new")
    proxy.seen.clear()
    assert capture(asked(corpus, proxy.place)) == [local.digest]
    assert [method for method, _, _ in proxy.seen] == ["GET"]  # a store that is there costs a look at its manifest


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_folder_as_a_bucket_and_other_dtypes(corpus, tmp_path, dtype):
    here, url = asked(corpus, tmp_path / "here", dtype=dtype), f"file://{tmp_path}/there"
    (digest,) = capture(here)
    assert capture(asked(corpus, url, dtype=dtype)) == [digest]
    assert_same(url, open_store(digest, here.stores), tmp_path / "new")


CHILD = """
import sys
import numpy as np
import actstore.manifest
actstore.manifest.MAX_CHUNK_BYTES = 1024 * 16 * 4
from pathlib import Path
from actstore import bucket_writer
from actstore.backends.toy import ToyBackend
from actstore.capture import CaptureRequest, capture
bucket_writer.LOOK_SECONDS, bucket_writer.LEASE_SECONDS = 0.05, 0.8
corpus, url, rounding = sys.argv[1:]
launch = ToyBackend.launch
def rounded(self, *arguments):
    made = launch(self, *arguments)
    return lambda: [np.nextafter(rows, np.float32(np.inf)) for rows in made()]
if rounding == "other":
    ToyBackend.launch = rounded
request = CaptureRequest("toy:16", ("blocks.0.hook_resid_pre",), (Path(corpus),), seq_len=32, rows=4500, backend="toy",
                         stores=url, batch_tokens=256)
print(*capture(request))
"""


def signalled(proxy, corpus: Path, number: int, part: str, after: int, rounding: str = "same") -> subprocess.Popen[str]:
    """Start a worker, and send it a signal while its request for the n-th object of some kind is under way."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(corpus), proxy.place, rounding],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sent = threading.Event()

    def fault(method: str, path: str, before: int) -> str | None:
        if method == "PUT" and part in path and proxy.moved("PUT", part) > after and not sent.is_set():
            os.kill(child.pid, number)
            sent.set()
            return "cut"
        return None

    proxy.fault = fault
    assert sent.wait(60), child.communicate()
    proxy.fault = lambda method, path, before: None
    return child


def test_the_row_groups_of_a_killed_worker_are_computed_by_another(corpus, local, proxy, tmp_path):
    child = signalled(proxy, corpus, signal.SIGKILL, "/row_groups/", 1)
    assert child.wait(60) == -signal.SIGKILL
    (listed,) = list_remote(open_bucket(proxy.place))
    assert not listed.sealed and "row groups are there" in listed.how_far
    notes: list[str] = []
    assert capture(asked(corpus, proxy.place, workers=2, rank=1), Progress(on_note=notes.append)) == [local.digest]
    assert any("gives no sign" in note for note in notes)
    assert_same(proxy.place, local, tmp_path / "new")


def test_a_worker_that_sleeps_until_the_store_is_sealed_changes_nothing(corpus, local, proxy, tmp_path):
    """It has claims, and other bytes for their row groups: when it wakes it writes them, drops them, and cleans up."""
    child = signalled(proxy, corpus, signal.SIGSTOP, "/chunks/", 0, "other")
    capture(asked(corpus, proxy.place))
    before = objects(proxy.place, local.digest)
    child.send_signal(signal.SIGCONT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out.strip()) == (0, local.digest), err
    assert objects(proxy.place, local.digest) == before
    assert_same(proxy.place, local, tmp_path / "new")


def worker(bucket: Bucket, local: Store, notes: list[str]) -> BucketWriter:
    return BucketPlace(bucket, notes.append).writer(local.key, local.rows, local.d_model)


def rows_of(local: Store, group: int, ulps: int = 0) -> list[np.ndarray]:
    start, stop = group * 1024, min(local.rows, (group + 1) * 1024)
    acts = np.array(local[start:stop])
    return [np.nextafter(acts, np.float32(np.inf)) if ulps else acts, *(local.read(a, start, stop) for a in ARRAYS)]


def test_the_first_record_wins_and_a_late_one_changes_no_byte(local, proxy):
    bucket, notes = open_bucket(proxy.place), []
    asleep, awake = worker(bucket, local, []), worker(bucket, local, notes)
    assert asleep.try_claim(0) is not None and awake.try_claim(0) is None
    awake._next_look = 0
    awake.look_again()  # the sleeper gave no sign at all
    assert awake.try_claim(0) is not None and "computed here" in notes[0]
    put_rows(awake, 0, *rows_of(local, 0))
    before = objects(proxy.place, local.digest)
    asleep.note = notes.append
    put_rows(asleep, 0, *rows_of(local, 0, ulps=1))
    assert objects(proxy.place, local.digest) == before and "dropped" in notes[1]
    assert before[chunk_name("acts", 0)] == (local.path / chunk_name("acts", 0)).read_bytes()
    for group in range(1, 5):
        put_rows(awake, group, *rows_of(local, group))
    awake.seal_once({"tokens": [], "special": []}, {})
    assert [*asleep.claims([3])] == [None] and asleep.is_sealed()  # it looks up, and computes no more


@pytest.mark.parametrize("off", ["create only", "own names"])
def test_control_without_its_protection_the_late_one_does_harm(local, proxy, monkeypatch, off):
    bucket = open_bucket(proxy.place)
    put_rows(worker(bucket, local, []), 0, *rows_of(local, 0))
    before = objects(proxy.place, local.digest)
    if off == "create only":
        monkeypatch.setattr(bucket_writer, "create_object", lambda b, name, data, limit: write_object(b, name, data) or data)
    else:
        monkeypatch.setattr(BucketWriter, "_staged", lambda self, index, array, chunk: f"{self.home}/{chunk_name(array, index)}")
        monkeypatch.setattr(bucket_writer, "copy_object", lambda *names: None)
        monkeypatch.setattr(bucket_writer, "delete_objects", lambda *names: None)
    put_rows(worker(bucket, local, []), 0, *rows_of(local, 0, ulps=1))
    assert objects(proxy.place, local.digest)[chunk_name("acts", 0)] != before[chunk_name("acts", 0)]


def test_a_claim_is_one_workers_as_long_as_it_beats(local, proxy, monkeypatch):
    bucket, now = open_bucket(proxy.place), [1000.0]
    first, second = worker(bucket, local, []), worker(bucket, local, [])
    monkeypatch.setattr(bucket_writer, "LEASE_SECONDS", 60.0)
    monkeypatch.setattr(bucket_writer, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def tried(after: float) -> bool:
        now[0] += after
        (claimed,) = second.claims([3])
        return claimed is not None

    assert first.try_claim(3) is not None
    for beats in range(1, 5):
        write_object(bucket, f".staging/{local.digest}/workers/{first.worker}", b"." * beats)
        assert not tried(50)  # always something new within a lease
    assert not tried(59) and tried(1)
    third = worker(bucket, local, [])
    second, first = third, second
    write_object(bucket, f".staging/{local.digest}/workers/{first.worker}", b".")
    assert not tried(0) and not tried(0) and not tried(60)  # the first claim has run out, the second lives
    delete_objects(bucket, [f".staging/{local.digest}/workers/{first.worker}"])
    assert tried(3)  # it said that it has ended


def test_a_worker_beats_until_it_ends(local, proxy, monkeypatch):
    monkeypatch.setattr(bucket_writer, "LEASE_SECONDS", 0.2)
    place = BucketPlace(open_bucket(proxy.place), lambda line: None)
    with place.holding(local.digest, True):
        for _ in range(1000):
            (data,) = objects(proxy.place, f".staging/{local.digest}/workers").values()
            if len(data) >= 3:
                break
        assert len(data) >= 3
    assert not objects(proxy.place, ".staging")


def test_two_sealers_at_once_end_in_one_store(local, proxy, tmp_path, monkeypatch):
    """Each with small files of its own, as of another version; one stops half-way while the other seals."""
    bucket = open_bucket(proxy.place)
    slow, quick = worker(bucket, local, []), worker(bucket, local, [])
    for group in range(5):
        put_rows(slow, group, *rows_of(local, group))

    def sealed_meanwhile(b: Bucket, name: str, data: bytes, limit: int) -> bytes:
        if name.endswith("acts/zarr.json") and data and not sealed:
            sealed.append(True)
            quick.seal({"tokens": ["b"], "special": []}, {"by": "quick"})
        return create_object(b, name, data, limit)

    sealed: list[bool] = []
    monkeypatch.setattr(bucket_writer, "create_object", sealed_meanwhile)
    slow.seal({"tokens": ["a"], "special": []}, {"by": "slow"})
    manifest, _, _ = remote_manifest(bucket, local.digest)
    assert sealed and manifest.provenance == {"by": "quick"} and manifest.content_digest == local.content_digest
    pull(bucket, local.digest, tmp_path)  # and every file is the one that the manifest names
    assert not check_store(tmp_path / local.digest, data=True).findings


def test_a_worker_that_stops_says_so_and_a_late_one_goes_on_at_once(corpus, local, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_writer, "LEASE_SECONDS", 600)  # nobody waits for it
    asked_to_stop: list[int] = []
    with pytest.raises(StoppedError):
        capture(asked(corpus, proxy.place), Progress(stop=lambda: asked_to_stop.append(1) or len(asked_to_stop) > 3))
    ran: list[int] = []
    launch = ToyBackend.launch
    monkeypatch.setattr(ToyBackend, "launch", lambda self, tokens, *rest: ran.append(tokens.size) or launch(self, tokens, *rest))
    capture(asked(corpus, proxy.place, workers=2, rank=1))
    assert 0 < sum(ran) < 2 * 1024
    assert_same(proxy.place, local, tmp_path / "new")


def test_faults_that_pass_are_not_noticed(corpus, local, proxy, tmp_path):
    faults = {
        "claims/0.0": "no-answer", record_name(0): "no-answer", MANIFEST: "no-answer", "claims/1.0": "500", record_name(1): "cut",
        chunk_name("acts", 1): "503", chunk_name("acts", 2): "no-answer", "zarr.json": "429", "/workers/": "no-answer",
    }  # fmt: skip
    proxy.fault = lambda method, path, before: (
        next((fault for part, fault in faults.items() if path.endswith(part) or (part[0] == "/" and part in path)), None)
        if method == "PUT" and before == 0
        else None
    )
    capture(asked(corpus, proxy.place))
    assert_same(proxy.place, local, tmp_path / "new")


@pytest.mark.parametrize("part", [chunk_name("acts", 1), MANIFEST])
def test_a_fault_that_stays_has_a_name_and_the_same_command_goes_on(corpus, local, proxy, tmp_path, part):
    """The first: a row group that is committed, and whose chunks have not got their names."""
    proxy.fault = lambda method, path, before: "403" if method == "PUT" and path.endswith(part) else None
    with pytest.raises(StorageFailed, match="refused the request") as error:
        capture(asked(corpus, proxy.place))
    assert error.value.do and "sesame" not in str(error.value)
    proxy.fault = lambda method, path, before: None
    capture(asked(corpus, proxy.place))
    assert_same(proxy.place, local, tmp_path / "new")


def test_a_bucket_that_overwrites_what_is_to_be_created_is_refused(corpus, proxy):
    proxy.dropped = "if-none-match"
    with pytest.raises(StorageFailed, match="If-None-Match"):
        capture(asked(corpus, proxy.place))


@pytest.mark.parametrize("name", [chunk_name("tokens", 2), record_name(4)])
def test_what_is_not_whole_is_not_sealed(local, proxy, name):
    bucket, writer = open_bucket(proxy.place), worker(open_bucket(proxy.place), local, [])
    for group in range(5):
        put_rows(writer, group, *rows_of(local, group))
    write_object(bucket, f"{local.digest}/{name}", b"{}")
    with pytest.raises(StoreDamaged, match="object row_groups/") as error:
        writer.seal({"tokens": [], "special": []}, {})
    assert "delete this object" in error.value.do and not list_remote(bucket)[0].sealed
    assert writer.read_committed(0) and group_digest(writer.read_committed(0)[0]) == local.manifest.groups[0]


def test_a_plan_for_a_bucket_knows_no_disk_and_leaves_nothing(corpus, proxy, monkeypatch):
    from datetime import datetime

    monkeypatch.setattr("actstore.forecast.CALIBRATION_SECONDS", 0.01)
    found = forecast(asked(corpus, proxy.place), datetime(2999, 1, 1), calibrated=True)
    assert found.plan.free_bytes is None and found.plan.needed_bytes > 4500 * 64 and found.calibration.disk_rows_per_s > 0
    assert not objects(proxy.place, ".staging") and list_remote(open_bucket(proxy.place)) == []
