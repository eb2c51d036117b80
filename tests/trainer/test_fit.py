"""Fleets, exact resume, and what a run folder holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import StopRequestError, stop_after, words, write_jsonl
from safetensors.torch import load_file

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store, remove_store
from actstore.errors import FormatError, StoreLocked, StoreNotFound, TrainingDiverged, UsageError
from trainer import FitConfig, FitProgress, find_run, fit, list_runs, load_sae
from trainer.batches import split_rows

CONFIG = FitConfig(n_latents=(64,), k=(4, 8), batch_size=128, epochs=2, dead_after_rows=1000)


KILLED = """
import os, sys
from actstore import open_store
from trainer import FitConfig, FitProgress, fit
steps = []
kill = lambda *a: steps.append(a) or (os.kill(os.getpid(), 9) if len(steps) == 9 else None)
config = FitConfig(n_latents=(64,), k=(4, 8), batch_size=128, epochs=2, dead_after_rows=1000)
fit(open_store(sys.argv[1]), config, sys.argv[2], progress=FitProgress(on_step=kill))
"""


def files_of(run):
    return {name: (run.path / name).read_bytes() for name in ("sae.safetensors", "metrics.jsonl", "config.json", "result.json")}


@pytest.fixture(scope="module")
def finished(toy_session_store, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return runs, fit(toy_session_store, CONFIG, runs)


def test_a_run_folder_is_named_by_its_digest_and_holds_everything(finished, toy_session_store):
    runs, results = finished
    for result, k in zip(results, (4, 8), strict=True):
        run = find_run(result.digest[:8], runs)
        assert run.config.k == k and run.store == toy_session_store.digest
        assert run.content_digest == toy_session_store.content_digest
        assert {p.name for p in run.path.iterdir()} == {
            "config.json",
            "environment.json",
            "metrics.jsonl",
            "sae.safetensors",
            "result.json",
        }
        assert run.key == toy_session_store.key.model_dump()
        environment = json.loads((run.path / "environment.json").read_text())
        assert environment["threads"] == torch.get_num_threads() and environment["versions"]["torch"]
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["rows"] == run.config.rows and lines[-1]["loss"] < lines[0]["loss"]
        assert result.metrics["held_out"]["explained_variance"] > 0.5
        assert set(load_file(run.path / "sae.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_the_loaded_sae_reconstructs_the_store(finished, toy_session_store):
    runs, results = finished
    sae = load_sae(results[1].digest, runs)
    x = torch.from_numpy(toy_session_store[:500].copy())
    x_hat = sae.decode(sae.encode(x)).detach()
    assert 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum() > 0.5


def test_a_finished_fit_returns_at_once(finished, toy_session_store):
    runs, results = finished
    started = []
    again = fit(toy_session_store, CONFIG, runs, progress=FitProgress(on_start=started.append))
    assert not started and [r.digest for r in again] == [r.digest for r in results] and all(r.repeated for r in again)


def test_a_fleet_trains_each_sae_as_if_alone(finished, toy_session_store, tmp_path):
    runs, results = finished
    (alone,) = fit(
        toy_session_store, FitConfig(n_latents=(64,), k=(8,), batch_size=128, epochs=2, dead_after_rows=1000), tmp_path
    )
    assert alone.digest == results[1].digest
    assert files_of(find_run(alone.digest, tmp_path)) == files_of(find_run(alone.digest, runs))


@pytest.mark.parametrize("at", [1, 2, 7, 30])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(finished, toy_session_store, tmp_path, at):
    runs, results = finished
    with pytest.raises(StopRequestError):
        fit(toy_session_store, CONFIG, tmp_path, progress=stop_after(at))
    with pytest.raises(StopRequestError):
        fit(toy_session_store, CONFIG, tmp_path, progress=stop_after(5))
    fit(toy_session_store, CONFIG, tmp_path)
    for result in results:
        assert files_of(find_run(result.digest, tmp_path)) == files_of(find_run(result.digest, runs))


def test_killed_it_goes_on_from_the_newest_checkpoint_that_verifies(finished, toy_session_store, tmp_path):
    runs, results = finished
    for at in (4, 6):
        with pytest.raises(StopRequestError):
            fit(toy_session_store, CONFIG, tmp_path, progress=stop_after(at))
    run = find_run(results[0].digest, tmp_path)
    steps = sorted(int(p.stem) for p in (run.path / "checkpoints").glob("*.json"))
    assert steps == [4, 10]  # the last two are kept
    newest = run.path / "checkpoints" / "10.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    # A fresh process, not a fork: torch's thread pool does not survive one.
    process = subprocess.run([sys.executable, "-c", KILLED, str(toy_session_store.path), str(tmp_path)], timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) > 4  # written after the checkpoint, and cut back now
    seen = []
    fit(toy_session_store, CONFIG, tmp_path, progress=FitProgress(on_start=seen.append))
    assert seen[0]["first_step"] == 4
    for result in results:
        assert files_of(find_run(result.digest, tmp_path)) == files_of(find_run(result.digest, runs))


def test_control_another_seed_gives_other_weights(finished, toy_session_store, tmp_path):
    runs, results = finished
    (other,) = fit(
        toy_session_store, FitConfig(n_latents=(64,), k=(8,), batch_size=128, epochs=2, dead_after_rows=1000, seed=(1,)), tmp_path
    )
    assert other.digest != results[1].digest
    assert (
        files_of(find_run(other.digest, tmp_path))["sae.safetensors"]
        != files_of(find_run(results[1].digest, runs))["sae.safetensors"]
    )


def test_no_held_out_row_is_trained_on(toy_session_store, tmp_path, monkeypatch):
    """Held-out rows poisoned with NaN change nothing of the weights: they were never read into a batch."""
    config = FitConfig(n_latents=(16,), k=(2,), batch_size=256, holdout=0.2)
    rows = []
    take = type(toy_session_store).take
    monkeypatch.setattr(
        type(toy_session_store),
        "take",
        lambda self, array, r, out=None: (rows.append(r) if array == "acts" else None, take(self, array, r, out))[1],
    )
    with pytest.raises(StopRequestError):
        fit(toy_session_store, config, tmp_path, progress=stop_after(1))
    assert rows and not set(np.concatenate(rows)) & set(split_rows(toy_session_store, config).held_out)


def test_a_diverging_loss_ends_with_step_and_rate(toy_session_store, tmp_path):
    with pytest.raises(TrainingDiverged, match="step") as caught:
        fit(
            toy_session_store,
            FitConfig(n_latents=(64,), k=(4,), lr=(1e38,), batch_size=64, warmup_fraction=0, decay_fraction=0),
            tmp_path,
        )
    assert "lr" in caught.value.do
    with pytest.raises(StoreNotFound, match="not finished"):
        load_sae(list_runs(tmp_path)[0].digest, tmp_path)


def test_a_store_being_read_is_not_removed_and_a_run_has_one_writer(toy_session_store, tmp_path):
    caught = []

    def attempt(*_):
        for job in (
            lambda: remove_store(toy_session_store.digest, toy_session_store.path.parent),
            lambda: fit(toy_session_store, CONFIG, tmp_path),
        ):
            try:
                job()
            except StoreLocked as error:
                caught.append(error)

    fit(toy_session_store, CONFIG, tmp_path, progress=FitProgress(on_start=attempt))
    assert len(caught) == 2
    assert open_store(toy_session_store.path).rows


def test_a_changed_config_or_weights_file_is_refused(finished, toy_session_store, tmp_path):
    (result,) = fit(toy_session_store, FitConfig(n_latents=(16,), k=(2,), rows=500), tmp_path)
    run = find_run(result.digest, tmp_path)
    weights = (run.path / "sae.safetensors").read_bytes()
    (run.path / "sae.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    with pytest.raises(FormatError, match="digest"):
        load_sae(result.digest, tmp_path)
    config = (run.path / "config.json").read_text()
    (run.path / "config.json").write_text(config.replace('"k":2', '"k":3'))
    with pytest.raises(FormatError, match="hash"):
        find_run(result.digest, tmp_path)
    damaged = []
    assert list_runs(tmp_path, damaged.append) == [] and len(damaged) == 1


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b"{}"), ("config.json", b"\xff"), ("result.json", b"[]"), ("result.json", b"{}"),
        ("sae.safetensors", b""), ("sae.safetensors", b"\x80\x04pickle"), ("sae.safetensors", b"\xff" * 8),
    ],
)  # fmt: skip
def test_hostile_run_files_are_format_errors(toy_session_store, tmp_path, name, content):
    (result,) = fit(toy_session_store, FitConfig(n_latents=(16,), k=(2,), rows=300), tmp_path)
    (tmp_path / result.digest / name).write_bytes(content)
    with pytest.raises(FormatError):
        load_sae(result.digest, tmp_path)


def test_a_huge_width_in_a_run_allocates_nothing(toy_session_store, tmp_path):
    (result,) = fit(toy_session_store, FitConfig(n_latents=(16,), k=(2,), rows=300), tmp_path)
    path = tmp_path / result.digest / "config.json"
    for width in ("1000000", "-1", "1e9", "true", '"32"'):
        path.write_text(path.read_text().replace('"d_model":32', f'"d_model":{width}'))
        with pytest.raises(FormatError):
            load_sae(result.digest, tmp_path)
        path.write_text(path.read_text().replace(f'"d_model":{width}', '"d_model":32'))


def test_prefixes_that_find_nothing(tmp_path):
    with pytest.raises(StoreNotFound):
        find_run("abcdef", tmp_path)
    with pytest.raises(UsageError):
        find_run("../x", tmp_path)


def test_an_int8_store_trains_like_the_float32_store_of_the_same_rows(tmp_path):
    """Same order of rows, same first SAE: what differs is the storage, and what rounding grows into over 200 steps."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", words(60, 60))
    stores, found, runs = {}, {}, {}
    for dtype in ("float32", "int8"):
        request = CaptureRequest(
            model="toy:32", hooks=("blocks.1.hook_resid_pre",), corpus=(corpus,), seq_len=64, backend="toy",
            stores=tmp_path / "stores", dtype=dtype,
        )  # fmt: skip
        stores[dtype] = open_store(capture(request)[0], request.stores)
        config = FitConfig(k=(4,), n_latents=(64,), batch_size=128, epochs=3, dead_after_rows=1000, holdout=0.3)
        runs[dtype] = fit(stores[dtype], config, tmp_path / "runs")[0]
        found[dtype] = runs[dtype].metrics["held_out"]["explained_variance"]
    assert found["int8"] == pytest.approx(found["float32"], abs=0.01) and found["int8"] > 0.5
    sae = load_sae(runs["float32"].digest, tmp_path / "runs")
    fvu = {}
    for dtype, store in stores.items():  # one and the same SAE on the rows of both
        x = torch.tensor(store[:])
        with torch.no_grad():
            fvu[dtype] = float((sae.decode(sae.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu["int8"] == pytest.approx(fvu["float32"], abs=5e-4)
