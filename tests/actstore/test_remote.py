"""Stores to and from a bucket: S3 is moto's on loopback, behind a proxy of ours that fails as a network does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import obstore
import pytest
from helpers import hostile, words, write_jsonl

from actstore import bucket as bucket_module
from actstore.arrivals import list_remote, remote_manifest
from actstore.bucket import Bucket, open_bucket, read_object, write_object
from actstore.capture import CaptureRequest, capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.errors import (
    ActstoreError,
    DiskFull,
    FormatError,
    KeyMismatch,
    StorageFailed,
    StoreDamaged,
    StoreNotFound,
    StoreNotSealed,
    UsageError,
)
from actstore.layout import MANIFEST, StorePaths, chunk_name, record_name
from actstore.reader import Store, open_unchecked
from actstore.remote import pull, push

ACTS = chunk_name("acts", 2)
SECRET = "sesame"  # part of the test credentials' secret


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    corpus = write_jsonl(folder / "corpus.jsonl", words(60))  # that of toy_request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)
        request = CaptureRequest(
            model="toy:16", hooks=("blocks.0.hook_resid_pre",), corpus=(corpus,), seq_len=32, rows=4500, backend="toy",
            stores=folder / "stores", batch_tokens=256,
        )  # fmt: skip
        return open_store(capture(request)[0], request.stores).path


@pytest.fixture
def store(captured, tmp_path) -> Store:
    """Five row groups, the last one short."""
    shutil.copytree(captured, tmp_path / "stores" / captured.name)
    return open_store(captured.name, tmp_path / "stores")


@pytest.fixture
def away(proxy) -> Bucket:
    return open_bucket(proxy.place, retries=1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def key_of(store: Store, name: str) -> str:
    return f"{store.digest}/{name}"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_store_comes_back_byte_for_byte(toy_request, proxy, tmp_path, dtype):
    store = open_store(capture(toy_request(rows=4500, dtype=dtype))[0], toy_request().stores)
    away = open_bucket(proxy.place)
    assert list_remote(away) == []
    seen: list[tuple[int, int]] = []
    done = push(store, away, lambda n, total: seen.append((n, total)))
    assert (done.moved_row_groups, done.repeated) == (len(store.manifest.groups), False)
    assert sum(n for n, _ in seen) == seen[0][1]
    (listed,) = list_remote(away)
    assert (listed.digest, listed.sealed, listed.manifest) == (store.digest, True, store.manifest)
    done = pull(away, store.digest[:8], tmp_path / "new")
    here = StorePaths(tmp_path / "new", store.digest)
    assert files(here.sealed) == files(store.path) and not check_store(here.sealed, data=True).findings
    assert done.moved_bytes > 4500 * 16 and not here.claims.exists() and not here.staging.exists()
    assert all(not os.access(p, os.W_OK) or os.geteuid() == 0 for p in here.sealed.rglob("c.*"))
    assert oct(os.stat(here.sealed / ACTS).st_mode)[-3:] == "444"


def test_what_is_there_does_not_move_again(store, proxy, away, tmp_path):
    push(store, away)
    pull(away, store.digest, tmp_path / "new")
    proxy.seen.clear()
    assert push(store, away).repeated and pull(away, store.digest, tmp_path / "new").repeated
    assert proxy.moved("PUT") == 0 and proxy.moved("GET", "/c.") == 0 and len(proxy.seen) <= 4
    obstore.delete(away._store, [key_of(store, ACTS), key_of(store, "vocabulary.json")])
    proxy.seen.clear()
    done = push(store, away)
    assert [path.rpartition(store.digest)[2] for m, path, _ in proxy.seen if m == "PUT"] == [f"/{ACTS}", "/vocabulary.json"]
    assert (done.moved_row_groups, done.moved_bytes) == (1, os.stat(store.path / ACTS).st_size)


CHILD = """
import sys
import actstore.manifest
actstore.manifest.MAX_CHUNK_BYTES = 1024 * 16 * 4
from pathlib import Path
from actstore import remote
from actstore.bucket import open_bucket
from actstore.catalog import open_store
remote.WORKERS = 2
what, url, stores, digest = sys.argv[1:]
if what == "push":
    remote.push(open_store(digest, stores), open_bucket(url))
else:
    remote.pull(open_bucket(url), digest, Path(stores))
"""


def killed(proxy, what: str, stores: Path, digest: str, method: str, after: int) -> None:
    """Run a push or pull in a process that is killed by SIGKILL while its request for the n-th chunk is under way."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, what, proxy.place, str(stores), digest])
    proxy.fault = lambda m, path, before: (
        os.kill(child.pid, signal.SIGKILL) or "cut"
        if proxy.moved(method, "/c.") > after and (m, "/c." in path) == (method, True)
        else None
    )
    assert child.wait(60) == -signal.SIGKILL
    proxy.fault = lambda m, path, before: None
    proxy.seen.clear()


def test_a_killed_push_is_no_store_and_goes_on(store, proxy, away, tmp_path):
    killed(proxy, "push", store.path.parent, store.digest, "PUT", after=9)
    (listed,) = list_remote(away)
    assert not listed.sealed and 1 <= listed.committed < 5 and "row groups are there" in listed.how_far
    with pytest.raises(StoreNotSealed, match="half-way"):
        pull(away, store.digest, tmp_path / "new")
    assert list_stores(tmp_path / "new") == []
    done = push(store, away)
    assert done.moved_row_groups == 5 - listed.committed and proxy.moved("PUT", "/c.") == 4 * done.moved_row_groups
    pull(away, store.digest, tmp_path / "new")
    assert files(tmp_path / "new" / store.digest) == files(store.path)


def test_a_killed_pull_is_no_store_and_goes_on(store, proxy, away, tmp_path):
    push(store, away)
    proxy.seen.clear()
    new = StorePaths(tmp_path / "new", store.digest)
    killed(proxy, "pull", tmp_path / "new", store.digest, "GET", after=9)
    (listed,) = list_stores(tmp_path / "new")
    assert not listed.sealed and 1 <= listed.committed < 5 and new.staging.is_dir() and not new.sealed.exists()
    done = pull(away, store.digest, tmp_path / "new")
    assert done.moved_row_groups == 5 - listed.committed and proxy.moved("GET", "/c.") == 4 * done.moved_row_groups
    assert files(new.sealed) == files(store.path)


@pytest.mark.parametrize("fault, name, said", [
    ("corrupt", ACTS, "has digest"), ("truncate", ACTS, "it must have"), ("missing", ACTS, "is missing"),
    ("corrupt", record_name(1), "record row_groups/1.json"), ("missing", record_name(1), "is missing"),
    ("corrupt", "vocabulary.json", "has digest"), ("missing", "acts/zarr.json", "is missing"),
    ("truncate", "key.json", "has digest"),
])  # fmt: skip
def test_no_damaged_object_gets_into_a_store(store, proxy, away, tmp_path, fault, name, said):
    push(store, away)
    if fault == "missing":
        obstore.delete(away._store, key_of(store, name))
    else:
        proxy.fault = lambda method, path, before: fault if method == "GET" and path.endswith(name) else None
    with pytest.raises(StoreDamaged, match=said) as error:
        pull(away, store.digest, tmp_path / "new")
    assert "delete this object" in error.value.do or name in error.value.what
    assert [line.sealed for line in list_stores(tmp_path / "new")] == [False]
    proxy.fault = lambda method, path, before: None
    push(store, away)  # mends what is missing
    pull(away, store.digest, tmp_path / "new")
    assert files(tmp_path / "new" / store.digest) == files(store.path)


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "cut-answer", "delay"])
def test_a_fault_that_passes_is_not_noticed(store, proxy, tmp_path, fault):
    away = open_bucket(proxy.place)
    only = lambda path: path.endswith((ACTS, record_name(0), MANIFEST)) or "list-type" in path  # noqa: E731
    proxy.fault = lambda method, path, before: (
        fault if before == 0 and only(path) and (method == "GET" or fault != "cut-answer") else None
    )
    push(store, away)
    pull(away, store.digest, tmp_path / "new")
    assert files(tmp_path / "new" / store.digest) == files(store.path)


@pytest.mark.parametrize("what, fault, said", [
    ("pull", "500", "HTTP 500"), ("push", "503", "HTTP 503"), ("ls", "429", "HTTP 429"), ("push", "cut", "failed"),
    ("pull", "cut-answer", "failed"), ("ls", "403", "refused the request"), ("push", "skew", "clock"),
])  # fmt: skip
def test_a_fault_that_stays_has_a_name_and_no_secret(store, proxy, away, tmp_path, fault, said, what):
    push(store, away)
    if what == "push":
        obstore.delete(away._store, key_of(store, ACTS))
    there = ACTS if what != "ls" else MANIFEST
    proxy.fault = lambda method, path, before: fault if path.endswith(there) else None
    with pytest.raises(StorageFailed) as error:
        {
            "push": lambda: push(store, away),
            "pull": lambda: pull(away, store.digest, tmp_path / "n"),
            "ls": lambda: list_remote(away),
        }[what]()
    text = str(error.value)
    assert error.value.exit_code == 6 and said in text and proxy.place in text and error.value.do
    assert SECRET not in text and "testing" not in text and error.value.__suppress_context__
    proxy.fault = lambda method, path, before: None
    push(store, away)
    pull(away, store.digest, tmp_path / "n")


def test_nothing_listens_or_no_bucket_or_no_credentials(store, proxy, monkeypatch, tmp_path):
    with pytest.raises(StoreNotFound, match="no such bucket"):
        push(store, open_bucket("s3://absent-bucket/x"))
    with pytest.raises(StoreNotFound, match="no store"):
        pull(open_bucket(proxy.place), store.digest, tmp_path / "n")
    with pytest.raises(StoreNotFound, match="begins with"):
        pull(open_bucket(proxy.place), "abcd", tmp_path / "n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageFailed, match="failed"):
        list_remote(open_bucket(proxy.place, retries=0))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="profile"):
        open_bucket(proxy.place)


def test_a_profile_gives_the_credentials(store, proxy, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = x\naws_secret_access_key = {SECRET}\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    away = open_bucket(proxy.place)
    assert push(store, away).moved_row_groups == 5 and SECRET not in repr(away)


@pytest.mark.parametrize("url", [
    "s3://user:pa55word@bucket/x", "s3://bucket/x?X-Amz-Signature=pa55word", "s3://bucket/../pa55word", "s3://bucket/a//pa55word",
    "https://pa55word/x", "s3://", "s3:bucket", "file://relative/pa55word", "s3://bucket/./pa55word", "s3://bucket/a#pa55word", "memory:///x",
])  # fmt: skip
def test_other_urls_are_refused_and_not_repeated(url):
    with pytest.raises(UsageError) as error:
        open_bucket(url)
    assert "pa55word" not in str(error.value)


def test_endpoints_without_encryption_or_with_credentials(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.example:9000")
    with pytest.raises(UsageError, match="no encryption"):
        open_bucket("s3://bucket/x")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    open_bucket("s3://bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://me:pa55word@minio.example")
    with pytest.raises(UsageError, match="carries credentials") as error:
        open_bucket("s3://bucket/x")
    assert "pa55word" not in str(error.value)


def test_without_obstore_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError) as error:
        open_bucket("s3://bucket/x")
    assert "pip install 'actstore[s3]'" in error.value.do


@pytest.fixture
def shared(tmp_path) -> Bucket:
    return open_bucket(f"file://{tmp_path}/a shared folder", make=True)


def test_hostile_manifests_are_refused_before_anything_is_fetched(store, shared, tmp_path):
    push(store, shared)
    path = tmp_path / "a shared folder" / store.digest / MANIFEST
    good = path.read_bytes()
    for data, said in (
        (hostile(store.manifest, rows=1 << 47), "cannot hold"),
        (hostile(store.manifest, rows=1 << 60), "rows"),
        (hostile(store.manifest, format=2), "format 1 lists"),
        (hostile(store.manifest, d_model=1 << 20), "statistics"),
        (hostile(store.manifest, files={**store.manifest.files, "../../x": "0" * 64}), "exactly the files"),
        (hostile(store.manifest, groups=["0" * 64] * 5), "content_digest"),
        (hostile(store.manifest, store="0" * 64), "store"),
        (b"{}", "manifest"), (b"", "JSON"), (b"[" * 10**6, "JSON|values"), (good[:-1], "JSON"),
        (good.replace(b'"rows":4500', b'"rows":4501'), "digest|damaged"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(FormatError, match=said):
            pull(shared, store.digest, tmp_path / "new")
        assert list_remote(shared)[0].problem
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that is never read
    with pytest.raises(FormatError, match="at most"):
        pull(shared, store.digest, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_the_names_a_manifest_implies_are_ever_asked_for(store, proxy, away, tmp_path):
    push(store, away)
    for name in (
        f"{store.digest}/acts/c.99.0",
        f"{store.digest}/evil.sh",
        "not-a-digest/manifest.json",
        f"{store.digest[:63]}/x",
    ):
        write_object(away, name, b"evil")
    huge = "f" * 64
    write_object(away, f"{huge}/{MANIFEST}", (store.path / MANIFEST).read_bytes())  # under another store's name
    listed = {line.digest: line for line in list_remote(away)}
    assert set(listed) == {store.digest, huge} and "not the digest" in listed[huge].problem
    with pytest.raises(FormatError, match="not the digest"):
        pull(away, huge, tmp_path / "new")
    pull(away, store.digest, tmp_path / "new")
    assert files(tmp_path / "new" / store.digest) == files(store.path)
    for prefix in ("../x", "ABCD", "abc", "/etc", ""):
        with pytest.raises(UsageError):
            pull(away, prefix, tmp_path / "new")
    with pytest.raises(FormatError, match="at most 10"):
        read_object(away, key_of(store, MANIFEST), 10)


def other_content(toy_request, store: Store, folder: Path) -> Store:
    """The same capture, rounded otherwise: another content digest under the same key."""
    from actstore import backends

    made = backends.toy.ToyBackend.launch

    def launch(self, tokens, lengths, hooks, dtypes):
        done = made(self, tokens, lengths, hooks, dtypes)
        return lambda: [np.nextafter(rows, np.float32(np.inf)) for rows in done()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.toy.ToyBackend, "launch", launch)
        other = open_store(capture(toy_request(rows=4500, stores=folder))[0], folder)
    assert other.digest == store.digest and other.content_digest != store.content_digest
    return other


def test_two_captures_of_one_key_are_never_mixed(toy_request, store, shared, tmp_path):
    other = other_content(toy_request, store, tmp_path / "theirs")
    push(other, shared)
    for work in (lambda: push(store, shared), lambda: pull(shared, store.digest, store.path.parent)):
        with pytest.raises(KeyMismatch, match="other content") as error:
            work()
        assert error.value.exit_code == 3
    assert open_store(store.digest, store.path.parent).content_digest == store.content_digest
    os.remove(tmp_path / "a shared folder" / store.digest / MANIFEST)  # half pushed by the other lab
    with pytest.raises(StoreDamaged, match="not the one the manifest names"):
        push(store, shared)


def test_a_pull_takes_what_the_folder_has_and_replaces_what_rounded_otherwise(toy_request, store, shared, tmp_path):
    push(store, shared)
    new = tmp_path / "new"
    capture(toy_request(rows=2500, stores=new))  # two full row groups of it
    done = pull(shared, store.digest, new)
    assert (done.linked_row_groups, done.moved_row_groups) == (2, 3)
    assert not check_store(new / store.digest, data=True).findings
    half = tmp_path / "half"  # an unfinished capture of the same key, whose third row group is another's
    other = other_content(toy_request, store, tmp_path / "theirs")
    for index, source in ((0, store), (2, other)):
        for name in (
            chunk_name("acts", index),
            *(chunk_name(a, index) for a in ("tokens", "documents", "positions")),
            record_name(index),
        ):
            target = half / ".staging" / store.digest / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((source.path / name).read_bytes())
    done = pull(shared, store.digest, half)
    assert done.moved_row_groups == 4 and files(half / store.digest) == files(store.path)


def test_too_little_space_is_said_before_the_first_chunk(store, shared, tmp_path, monkeypatch):
    push(store, shared)
    monkeypatch.setattr("actstore.remote.MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match="GB to spare"):
        pull(shared, store.digest, tmp_path / "new")
    assert not list((tmp_path / "new" / ".staging" / store.digest / "acts").iterdir())


def test_a_damaged_store_is_not_pushed(store, shared, tmp_path):
    path = store.path / ACTS
    os.chmod(path, 0o644)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"acts/c\.2\.0"):
        push(store, shared)
    assert not list_remote(shared)[0].sealed


def test_two_pushes_at_once_end_in_one_whole_store(store, proxy, away, tmp_path):
    errors: list[ActstoreError] = []

    def work() -> None:
        try:
            push(store, open_bucket(proxy.place))
        except ActstoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    pull(away, store.digest, tmp_path / "new")
    assert files(tmp_path / "new" / store.digest) == files(store.path)


def test_the_manifest_goes_up_last_and_comes_down_first(store, proxy, away, tmp_path):
    push(store, away)
    puts = [path.rpartition(store.digest)[2][1:] for method, path, _ in proxy.seen if method == "PUT"]
    assert puts[-1] == MANIFEST
    for group in range(5):
        assert all(puts.index(chunk_name(a, group)) < puts.index(record_name(group)) for a in ("acts", "tokens"))
    proxy.seen.clear()
    pull(away, store.digest, tmp_path / "new")
    assert proxy.seen[0][1].endswith(MANIFEST)


def test_the_errors_of_a_bucket_end_in_our_classes():
    for text, kind in (
        ("status code: 500", StorageFailed),
        ("<Code>AccessDenied</Code>", StorageFailed),
        ("anything", StorageFailed),
    ):
        found = bucket_module._failure(ValueError(text), "s3://x")
        assert isinstance(found, kind) and isinstance(found, ActstoreError)


def test_remote_manifest_tells_unsealed_from_absent(store, away):
    with pytest.raises(StoreNotFound):
        remote_manifest(away, store.digest)
    write_object(away, key_of(store, record_name(0)), b"{}")
    with pytest.raises(StoreNotSealed):
        remote_manifest(away, store.digest)
    assert open_unchecked(store.path).manifest == store.manifest
