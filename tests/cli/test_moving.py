"""`actstore push`, `pull`, `ls URL` and `trainer fit --store URL#HASH` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner

from actstore.capture import capture

BIN = Path(sys.executable).parent


def run(main, *args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def stores(toy_request, tmp_path):
    capture(toy_request())
    return tmp_path / "stores"


def test_a_folder_as_a_bucket_from_push_to_fit(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (digest,) = (p.name for p in stores.glob("?" * 64))
    url = f"file://{tmp_path}/bucket"
    assert "no such folder" in run(actstore_main, "ls", url).stderr
    pushed = run(actstore_main, "push", digest[:6], url)
    assert pushed.exit_code == 0 and pushed.stdout.strip() == digest and "row groups moved" in pushed.stderr
    again = run(actstore_main, "push", digest[:6], url, "--json")
    assert json.loads(again.stdout)["repeated"] is True
    listed = json.loads(run(actstore_main, "ls", url, "--json").stdout)["stores"]
    assert [(line["digest"], line["sealed"]) for line in listed] == [(digest, True)]
    pulled = run(actstore_main, "pull", digest[:6], url, "--stores", "new", "--json")
    assert pulled.exit_code == 0 and json.loads(pulled.stdout)["moved_row_groups"] == 1
    options = ("--n-latents", 32, "--k", 4, "--batch-size", 128)
    there = run(trainer_main, "fit", "--store", f"{url}#{digest[:6]}", "--cache", "cache", *options)
    assert there.exit_code == 0, there.stderr
    here = run(trainer_main, "fit", "--store", digest[:6], "--stores", "new", "--shuffle", "chunks", *options)
    assert here.stdout == there.stdout and "already trained" in here.stderr


@pytest.mark.parametrize("args, code, said", [
    (("push", "abcd", "file:///nowhere"), 5, "begins with"), (("pull", "abcd", "s3://user:pa55word@bucket"), 2, "no URL"),
    (("ls", "https://pa55word"), 2, "no URL"), (("pull", "../x", "file:///tmp"), 2, "not a digest"),
])  # fmt: skip
def test_what_cannot_be_meant_ends_in_one_message(stores, args, code, said):
    result = run(actstore_main, *args, "--stores", stores)
    assert (
        result.exit_code == code
        and said in result.stderr
        and "Traceback" not in result.stderr
        and "pa55word" not in result.stderr
    )


def test_a_cache_size_that_is_none(stores, tmp_path):
    result = run(trainer_main, "fit", "--store", "file:///x#abcd", "--cache-size", "8h", "--stores", stores)
    assert result.exit_code == 2 and "no number of bytes" in result.stderr


def interrupt(child, proxy, when):
    """Send Ctrl-C to a command at the first request for which `when(path, before)`; it says how to go on."""
    told = threading.Event()

    def fault(method, path, before):
        if told.is_set() or not when(path, before):
            return None
        told.set()
        child.send_signal(signal.SIGINT)
        return "delay"

    proxy.fault = fault
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "run the same command again" in err and "Traceback" not in err and not out


def test_ctrl_c_says_how_to_go_on(stores, proxy):
    (digest,) = (p.name for p in stores.glob("?" * 64))
    child = subprocess.Popen(
        [BIN / "actstore", "push", digest, proxy.place, "--stores", stores],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    interrupt(child, proxy, lambda path, before: "/c." in path and before == 0 and proxy.moved("PUT", "/c.") == 1)
    assert run(actstore_main, "push", digest, proxy.place, "--stores", stores).exit_code == 0


def test_two_workers_capture_into_a_bucket_one_was_interrupted_before(toy_request, tmp_path, proxy):
    options = ["--model", "toy:16", "--backend", "toy", "--hook", "blocks.0.hook_resid_pre", "--corpus", toy_request().corpus[0]]
    command = [BIN / "actstore", "capture", *options, "--seq-len", "32", "--stores", proxy.place]

    def start(rank: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)

    interrupt(start(0), proxy, lambda path, before: "/chunks/" in path)
    done = [(*worker.communicate(timeout=60), worker.returncode) for worker in [start(0), start(1)]]
    (digest,) = {out.strip() for out, _, _ in done}
    assert len(digest) == 64 and [code for _, _, code in done] == [0, 0] and "worker 1 of 2 (by RANK)" in done[1][1]
    listed = json.loads(run(actstore_main, "ls", proxy.place, "--json").stdout)["stores"]
    assert [(line["digest"], line["sealed"]) for line in listed] == [(digest, True)]
    again = run(actstore_main, "capture", *command[2:], "--json")
    assert "already captured" in again.stderr and json.loads(again.stdout)["rows"] == listed[0]["rows"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl"]
    fitted = run(trainer_main, "fit", "--store", f"{proxy.place}#{digest[:8]}", "--cache", tmp_path / "cache", "--n-latents", 32,
                 "--k", 4, "--batch-size", 128, "--runs", tmp_path / "runs")  # fmt: skip
    assert fitted.exit_code == 0, fitted.stderr


@pytest.mark.parametrize("args, said", [
    (("rm", "abcd"), "works on a folder"), (("gc",), "works on a folder"), (("verify", "abcd"), "works on a folder"),
    (("capture", "--repair"), "--repair works on a folder"), (("capture",), "no URL of an object store"),
])  # fmt: skip
def test_what_needs_a_folder_says_so_of_a_url(args, said):
    result = run(actstore_main, *args, "--stores", "s3://user:pa55word@bucket/x")
    assert result.exit_code == 2 and said in result.stderr and "pa55word" not in result.stderr
