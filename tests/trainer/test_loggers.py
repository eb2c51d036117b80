"""What viewers are given equals metrics.jsonl, also after interruptions: read back from their own files."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from actstore_cli.trainer import main
from click.testing import CliRunner
from helpers import StopRequestError, stop_after

from actstore.errors import UsageError
from trainer import FitConfig, FitProgress, find_run, fit
from trainer.loggers import PROJECT, log_to
from trainer.saved import read_metrics

CONFIG = FitConfig(n_latents=(16,), k=(2, 4), batch_size=128, epochs=1, dead_after_rows=500)


def tensorboard_series(runs: Path, run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (runs / "tensorboard").glob(f"*{run.digest[:12]}")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def wandb_records(path: Path) -> list:
    """A run's file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, text, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        text += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(text))
            text = b""
    return found


def wandb_series(runs: Path, run):
    """The newest offline run; one of the same second has another -1 in its folder's name."""
    paths = (runs / "wandb").glob(f"offline-run-*/run-{run.digest}.wandb")
    path = max(paths, key=lambda path: (path.parent.name.split("-")[2], path.parent.name))
    for _ in range(100):  # wandb's service writes the last block after `finish` has returned
        records = wandb_records(path)
        if records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    found = {}
    for record in records:
        items = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for name, value in items.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((record.history.step.num, float(value)))
    return found


def trackio_series(runs: Path, run):
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = [r["name"] for r in SQLiteStorage.get_run_records(PROJECT) if run.digest[:12] in r["name"]]
    found = {}
    for line in SQLiteStorage.get_logs(PROJECT, name):
        for key, value in line.items():
            if key not in ("step", "timestamp"):
                found.setdefault(key, []).append((line["step"], value))
    return found


READERS = {"tensorboard": tensorboard_series, "wandb": wandb_series, "trackio": trackio_series}


def crash_after(n: int):
    """The progress of a fit that dies after n steps, with no checkpoint."""
    steps = []

    def step(rows, latest):
        steps.append(rows)
        if len(steps) >= n:
            raise StopRequestError

    return FitProgress(on_step=step)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A machine without a network: every connection but one of this machine itself fails the test."""
    import socket

    connect, asked = socket.socket.connect, []

    def refuse(self, address):
        local = self.family == socket.AF_UNIX or str(address[0]).startswith("127.")
        return connect(self, address) if local else asked.append(address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")  # with one, trackio would ask the hub whose it is
    yield
    assert asked == []


@pytest.mark.parametrize("name", READERS)
def test_what_is_logged_equals_the_metrics_file_after_interruptions(toy_session_store, tmp_path, name, offline, monkeypatch):
    pytest.importorskip(name)
    if name == "trackio":  # it reads its folder once, when it is imported
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for module in ("trackio.utils", "trackio.sqlite_storage"):
            monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    runs = tmp_path / "runs"
    for progress in (stop_after(4), crash_after(3)):
        with pytest.raises(StopRequestError), log_to(name, runs, progress) as logged:
            fit(toy_session_store, CONFIG, runs, progress=logged)
    with log_to(name, runs) as logged:
        results = fit(toy_session_store, CONFIG, runs, progress=logged)
    for result in results:
        run = find_run(result.digest, runs)
        lines, series = read_metrics(run.path), READERS[name](runs, run)
        assert len(lines) > 10
        for key in set(lines[0]) - {"step"}:
            wanted = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]  # TensorBoard keeps float32
            assert series[key] == wanted, key
        last = lines[-1]["step"]
        assert series["held_out/fvu"] == [(last, pytest.approx(run.result["held_out"]["fvu"], rel=1e-6))]


def test_a_finished_run_logs_nothing_again(toy_session_store, tmp_path):
    pytest.importorskip("tensorboard")
    fit(toy_session_store, CONFIG, tmp_path)
    with log_to("tensorboard", tmp_path) as logged:
        fit(toy_session_store, CONFIG, tmp_path, progress=logged)
    assert not (tmp_path / "tensorboard").exists()


def test_a_missing_package_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught, log_to("trackio", tmp_path):
        pass
    assert caught.value.do == "pip install trackio"


def test_an_unknown_logger_lists_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="no logger") as caught, log_to("mlflow", tmp_path):
        pass
    assert "tensorboard, wandb, trackio" in caught.value.do


def test_the_packages_are_imported_only_when_asked_for(monkeypatch):
    import subprocess
    import sys

    code = "import sys, trainer.loggers; print([m for m in ('wandb', 'tensorboard', 'trackio') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", READERS)
def test_the_command_still_prints_digests_alone(toy_session_store, tmp_path, name, offline):
    pytest.importorskip(name)
    stores = toy_session_store.path.parent
    words = ["fit", "--store", toy_session_store.digest, "--stores", stores, "--runs", tmp_path, "--n-latents", 16, "--k", "2,3"]
    result = CliRunner().invoke(main, [str(word) for word in (*words, "--batch-size", 512, "--log", name)])
    assert result.exit_code == 0 and [len(line) for line in result.stdout.splitlines()] == [64, 64], result.output
