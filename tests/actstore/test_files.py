"""Reading below a folder: links on the way, special files, read-only media, and network mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from helpers import cannot

from actstore import durable
from actstore.catalog import open_store
from actstore.check import check_store
from actstore.errors import FormatError, StorageFailed, StoreLocked, StoreNotSealed
from actstore.files import folder_below, opened, read_bounded
from actstore.mounts import network_filesystem


def test_every_folder_on_the_way_must_be_one(tmp_path):
    (tmp_path / "outside" / "b").mkdir(parents=True)
    (tmp_path / "outside" / "b" / "file").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "c").write_bytes(b"")
    for root, name in ((tmp_path / "root", "a/b/file"), (tmp_path / "root" / "a", "b/file"), (tmp_path / "root", "c/file")):
        with pytest.raises(FormatError):
            read_bounded(root, name, 100)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "root", "no/file", 100)
    assert read_bounded(tmp_path / "outside", "b/file", 6) == b"secret"


def test_no_descriptor_stays_open(tmp_path):
    (tmp_path / "a").mkdir()
    before = set(os.listdir("/proc/self/fd"))
    for name in ("a/x", "b/x", "a"):
        with pytest.raises((FileNotFoundError, FormatError)):
            read_bounded(tmp_path, name, 1)
    with folder_below(tmp_path, "a"):
        pass
    (tmp_path / "a" / "file").write_bytes(b"")
    with opened(tmp_path, "a/file"):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


def test_extra_folders_and_links_are_findings(toy_store):
    os.chmod(toy_store.path, 0o755)
    (toy_store.path / "more").mkdir()
    (toy_store.path / "acts" / "link").symlink_to("/etc")
    findings = check_store(toy_store.path).findings
    assert findings == ["extra file acts/link", "extra file more"]


def test_an_unsealed_store_says_how_far_it_is(toy_store):
    (toy_store.path / "manifest.json").unlink()
    with pytest.raises(StoreNotSealed, match="1 row groups are committed"):
        open_store(toy_store.path)


def test_a_refused_lock_names_process_host_and_time(tmp_path):
    import socket

    path = tmp_path / "x.lock"
    with durable.lock(path, f"a fit, pid {os.getpid()} on {socket.gethostname()}"):
        with pytest.raises(StoreLocked) as caught, durable.lock(path, "another"):
            pass
        for word in (f"pid {os.getpid()}", socket.gethostname(), " since 20", "UTC"):
            assert word in caught.value.what


@pytest.fixture
def read_only(toy_store):
    """The folder of stores, mounted read-only on itself."""
    if os.geteuid() != 0:
        cannot("mounting needs root")
    stores = toy_store.path.parent
    for part in (stores, *stores.rglob(".locks"), *stores.rglob(".locks/*")):
        assert part.exists()
    commands = (["mount", "--bind", stores, stores], ["mount", "-o", "remount,ro,bind", stores])
    done = [subprocess.run(command, capture_output=True, check=False).returncode for command in commands]
    if any(done):
        cannot("mount is not permitted here")
    yield toy_store
    subprocess.run(["umount", stores], check=True)


def test_everything_but_writing_works_on_a_read_only_medium(read_only, tmp_path):
    stores, digest = ("--stores", str(read_only.path.parent)), read_only.digest
    assert open_store(read_only.path)[:3].shape == (3, 16)
    for command in (["ls"], ["info", digest], ["verify", digest, "--data"], ["head", digest]):
        result = CliRunner().invoke(actstore_main, [*command, *stores])
        assert result.exit_code == 0, result.stderr
    fit = ["fit", "--store", digest, *stores, "--runs", str(tmp_path / "runs"), "--n-latents", "16", "--k", "2", "--rows", "300"]
    result = CliRunner().invoke(trainer_main, fit)
    assert result.exit_code == 0 and result.stderr.count("not locked") == 1, result.stderr
    for main, command in (
        (actstore_main, ["rm", "--yes", digest, *stores]),
        (trainer_main, [*fit[:4], *stores[1:], "--runs", str(read_only.path.parent / "runs")]),
        (actstore_main, ["capture", "--backend", "toy", "--model", "toy:8", "--hook", "hook_embed", "--corpus",
                         str(tmp_path / "corpus.jsonl"), *stores]),
    ):  # fmt: skip
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 6 and result.stderr.startswith("StorageFailed: "), result.stderr
        assert "Traceback" not in result.stderr


NOBODY = 65534


def test_a_missing_permission_is_storage_failed(toy_store):
    """As another user when this is root, who may read everything."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        path = shutil.copytree(toy_store.path, Path(home) / toy_store.digest)
        assert open_store(path)
        os.chmod(path / "manifest.json", 0)
        was = os.geteuid()
        if was == 0:
            os.seteuid(NOBODY)
        try:
            with pytest.raises(StorageFailed):
                open_store(path)
        finally:
            os.seteuid(was)


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /home rw shared:2 - nfs4 server:/home rw
31 30 0:27 / /home/me/my\\040disk rw - tmpfs tmpfs rw
32 22 0:28 / /mnt/a rw - fuse.sshfs host: rw
33 22 0:29 / /mnt/b rw master:1 - cifs //host/share rw
34 22 0:30 / /mnt/ab rw - lustre x rw
35 32 0:31 / /mnt/a rw - ext4 /dev/vdb rw
damaged line
"""


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("/", ""), ("/home/me/stores", "nfs4"), ("/home/me/my disk/stores", ""), ("/homes", ""), ("/mnt/a/x", ""),
        ("/mnt/b", "cifs"), ("/mnt/ab/stores", "lustre"), ("/mnt/abc", ""),
    ],
)  # fmt: skip
def test_a_network_file_system_is_recognized(tmp_path, folder, expected):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert network_filesystem(Path(folder), tmp_path / "mountinfo") == expected


def test_without_a_list_of_mounts_nothing_is_said(tmp_path):
    assert network_filesystem(tmp_path, tmp_path / "absent") == ""


def test_capture_warns_of_a_network_file_system(tmp_path, toy_request, monkeypatch):
    monkeypatch.setattr("actstore.mounts.network_filesystem", lambda folder: "nfs4")
    corpus = str(toy_request().corpus[0])
    result = CliRunner().invoke(
        actstore_main, ["capture", "--backend", "toy", "--model", "toy:8", "--hook", "hook_embed", "--seq-len", "16",
                        "--corpus", corpus, "--stores", str(tmp_path / "s")]
    )  # fmt: skip
    assert result.exit_code == 0 and "network file system (nfs4)" in result.stderr


CUT_WHILE_MAPPED = """
import importlib, os, sys
from actstore_cli.trainer import main
fit = importlib.import_module("trainer.fit")
train_step = fit.train_step
steps = []
def cut(member, *batch):
    if len(steps) == 2:
        os.chmod(sys.argv[1] + "/acts/c.0.0", 0o644)
        os.truncate(sys.argv[1] + "/acts/c.0.0", 4096)
    steps.append(1)
    return train_step(member, *batch)
fit.train_step = cut
sizes = ["--n-latents", "16", "--k", "2", "--batch-size", "64", "--epochs", "3"]
main(["fit", "--store", sys.argv[1], "--runs", sys.argv[2], *sizes])
"""


def test_a_chunk_cut_short_while_mapped_ends_training_with_a_message(toy_store, tmp_path):
    """Row 11: SIGBUS, named by faulthandler; no result and no checkpoint comes after it."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_WHILE_MAPPED, toy_store.path, tmp_path / "runs"], capture_output=True, text=True, check=False
    )
    assert done.returncode == -7 and "Fatal Python error: Bus error" in done.stderr and done.stdout == "", done.stderr
    (run,) = [path for path in (tmp_path / "runs").iterdir() if len(path.name) == 64]
    assert not (run / "result.json").exists() and not list((run / "checkpoints").iterdir())
