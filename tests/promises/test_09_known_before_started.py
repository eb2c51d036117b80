"""Promise 9: disk and memory needed are computed and compared with what is free before the model loads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import TINY
from safetensors.numpy import load_file

from actstore import plan
from actstore.backends import load_backend
from actstore.backends.toy import ToyBackend
from actstore.capture import CaptureRequest, Plan, Progress, capture
from actstore.catalog import list_stores, open_store
from actstore.errors import DiskFull, UsageError


@pytest.fixture
def no_model(monkeypatch):
    """Any use of the model is a failure of the test."""

    def refuse(*args):
        raise AssertionError("the model ran before the plan was refused")

    monkeypatch.setattr(ToyBackend, "launch", refuse)


def test_a_disk_that_cannot_hold_the_capture_is_refused_with_both_numbers(toy_request, no_model, monkeypatch):
    monkeypatch.setattr(plan, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match=r"needs .* GB .* are free"):
        capture(toy_request())
    assert not any(line.sealed or line.committed for line in list_stores(toy_request().stores))


def test_a_memory_that_cannot_hold_the_weights_is_refused_with_both_numbers(toy_request, no_model, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"at least .* GB of memory, 0\.00 GB are available"):
        capture(toy_request())


def test_what_was_planned_is_what_was_written(toy_request):
    plans: list[Plan] = []
    request = toy_request()
    store = open_store(capture(request, Progress(on_plan=plans.append))[0], request.stores)
    written = int(subprocess.run(["du", "-sb", store.path], capture_output=True, text=True, check=True).stdout.split()[0])
    chunks = sum(p.stat().st_size for p in store.path.rglob("c.*"))
    assert chunks <= plans[0].needed_bytes <= written
    assert plans[0].rows == store.rows and plans[0].available_bytes > plans[0].memory_bytes > 0


def test_the_memory_of_weights_leaves_out_layers_that_are_not_loaded():
    tensors = {name: x for path in TINY.glob("*.safetensors") for name, x in load_file(path).items()}
    backend = load_backend("transformer_lens", str(TINY), None, "float32", "cpu")
    everything = 4 * sum(x.size for x in tensors.values())
    behind = 4 * sum(x.size for name, x in tensors.items() if ".h.2." in name or ".h.3." in name)
    assert behind > 0
    assert backend.weight_bytes(["blocks.3.hook_resid_post"]) == everything
    assert backend.weight_bytes(["blocks.1.hook_resid_pre"]) == everything - behind
    assert load_backend("transformer_lens", str(TINY), None, "float16", "cpu").weight_bytes(["ln_final.hook_normalized"]) * 2 == (
        everything
    )


def test_a_dry_run_writes_nothing(toy_request, no_model, tmp_path: Path):
    plans: list[Plan] = []
    request: CaptureRequest = toy_request(stores=tmp_path / "none")
    capture(request, Progress(on_plan=plans.append), dry_run=True)
    assert plans[0].needed_bytes > 0 and not (tmp_path / "none").exists()
