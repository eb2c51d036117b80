"""What a fleet takes of memory, and that one too large for it is trained in passes to the same weights."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load

from actstore.capture import capture
from actstore.catalog import open_store
from actstore.errors import UsageError
from trainer import FitConfig, FitProgress, find_run, fit
from trainer.config import resolve
from trainer.memory import member_bytes, memory_of, passes
from trainer.sae import Widths
from trainer.saved import tensor_pieces


def configs(*sizes):
    return resolve(FitConfig(n_latents=sizes, k=(4,)), 32, 10_000)


def test_as_many_at_once_as_fit_and_in_order():
    fleet = configs(64, 64, 128, 64)
    one = member_bytes(fleet[0], Widths((32,)))
    assert passes(fleet, Widths((32,)), None) == [[0, 1, 2, 3]]
    assert passes(fleet, Widths((32,)), 2 * one + 10) == [[0, 1], [2], [3]]
    assert passes(fleet, Widths((32,)), 10 * one) == [[0, 1, 2, 3]]
    with pytest.raises(UsageError, match="128 latents takes"):
        passes(fleet, Widths((32,)), one)
    assert memory_of(torch.device("cpu")) > 0


def test_a_fleet_in_passes_has_the_same_weights(toy_session_store, tmp_path):
    config = FitConfig(n_latents=(64,), k=(2, 4, 8), batch_size=256)
    told = []
    limit = int(2.5 * member_bytes(configs(64)[0], Widths((32,))))
    split = fit(toy_session_store, config, tmp_path / "a", max_memory=limit, progress=FitProgress(on_start=told.append))
    assert [(about["saes"], about["pass"], about["passes"]) for about in told] == [(2, 1, 2), (1, 2, 2)]
    whole = fit(toy_session_store, config, tmp_path / "b")
    for a, b in zip(split, whole, strict=True):
        files = [(find_run(a.digest, tmp_path / name).path / "sae.safetensors").read_bytes() for name in ("a", "b")]
        assert a.digest == b.digest and files[0] == files[1]
    with pytest.raises(UsageError, match="may be used"):
        fit(toy_session_store, config, tmp_path / "c", max_memory=1000)
    assert not list((tmp_path / "c").glob("*/checkpoints/*"))


def test_a_file_of_tensors_needs_no_copy_and_is_safetensors():
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "empty": torch.empty(0, 4),
        "ä": torch.tensor([1, 2]),
        "d": torch.ones(3).double(),
    }
    pieces = tensor_pieces(tensors)
    assert sum(isinstance(piece, memoryview) for piece in pieces) == 3
    loaded = load(b"".join(pieces))
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    tensors["a"][0, 0] = 9
    assert load(b"".join(pieces))["a"][0, 0] == 9  # the memory is the tensor's own


PEAK = """
import sys, threading
from actstore import open_store
from trainer import FitConfig, FitProgress, fit
import trainer.fit as module
sys.modules["trainer.fit"].CHECKPOINT_SECONDS = 0.0
config = FitConfig(n_latents=(int(sys.argv[3]),), k=(32,), batch_size=256, rows=512)
fit(open_store(sys.argv[1]), config, sys.argv[2])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_grows_by_four_times_the_weights(toy_request, tmp_path):
    """Checkpoints and the finished file included; the difference between two sizes leaves out what torch itself takes."""

    request = toy_request(model="toy:128", seq_len=64)
    store = open_store(capture(request)[0], request.stores)

    def peak(n):
        command = [sys.executable, "-c", PEAK, str(store.path), str(tmp_path / str(n)), str(n)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return 1024 * int(re.findall(r"(\d+) kB", out)[0])

    small, large = 4096, 1 << 16
    grown = peak(large) - peak(small)
    weights = 4 * 2 * 128 * (large - small)
    assert 3 * weights < grown < 4 * weights + (200 << 20)  # scores of a chunk at a time, counts, what the allocator keeps
