"""Matching and splitting on directions whose answer is known, and the table of runs."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from actstore.errors import UsageError
from trainer import FitConfig, compare, find_run, fit
from trainer.checkpoint import new_sae
from trainer.config import resolve
from trainer.evaluate import evaluate
from trainer.sae import Widths


def sae_of(W_dec, W_enc=None):
    W_dec = torch.as_tensor(W_dec, dtype=torch.float32)
    (config,) = resolve(FitConfig(n_latents=(len(W_dec),), k=(1,)), W_dec.shape[1], 100)
    sae = new_sae(config, Widths((W_dec.shape[1],)))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec if W_enc is None else W_enc)
    return sae


def test_the_matching_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    partners, cosines = compare.match(a, b)
    table = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    best = max(itertools.permutations(range(6)), key=lambda p: sum(table[i, j] for i, j in enumerate(p)))
    assert tuple(partners) == best and partners.tolist() != table.argmax(1).tolist()
    np.testing.assert_allclose(cosines, table[range(6), best], rtol=1e-5)


def test_a_shuffled_copy_is_the_same_and_half_a_copy_is_half():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 16, generator=generator)
    order = torch.randperm(20, generator=generator)
    found = compare.stability(sae_of(w), sae_of(3 * w[order]))
    assert found["decoder"] == pytest.approx({"mean": 1, "median": 1, "shared": 1, "mmcs": 1, "mmcs_back": 1})
    assert found["agreeing"] == found["shared_in_both"] == 1
    half = w[order].clone()
    half[:10] = torch.randn(10, 16, generator=generator)
    found = compare.stability(sae_of(w, w), sae_of(half, w), threshold=0.95)
    assert found["decoder"]["shared"] == 0.5 and found["encoder"]["shared"] == 1
    assert found["shared_in_both"] == found["agreeing"] < 0.2  # the encoder's partner is itself, the decoder's the shuffled one
    assert found["decoder"]["mmcs"] != found["decoder"]["mmcs_back"] < 0.9


def test_parents_and_their_children():
    parents = np.eye(4, 6)
    children = np.zeros((7, 6))
    children[0, 0] = 1  # of parent 0: itself
    children[1, [1, 4]] = 1  # of parent 1: two, at 0.707
    children[2, [1, 5]] = 1
    for i in (3, 4, 5, 6):  # of parent 2: four, of which three count, at 0.447; of parent 3: none
        children[i, [2, 5]] = 1, 2
        children[i, 4] = 1e-3 * i
    found = compare.splitting(sae_of(parents), sae_of(children))
    assert found["children"] == [1, 1, 1, 1]
    assert found["fidelity"] == pytest.approx((1 + 0.5**0.5 + 0.2**0.5 + 0) / 4, abs=1e-5)
    assert (found["high"], found["middle"], found["low"]) == (0.25, 0.25, 0.5)


def test_too_many_pairs_are_compared_by_their_nearest_alone(monkeypatch):
    monkeypatch.setattr(compare, "MAX_COSINES", 10)
    found = compare.stability(sae_of(np.eye(4)), sae_of(np.eye(4)))
    assert found["decoder"] == {"mmcs": 1.0, "mmcs_back": 1.0}


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match="needs scipy") as caught:
        compare.match(torch.eye(2), torch.eye(2))
    assert "actstore[compare]" in caught.value.do and "--no-pairs" in caught.value.do


@pytest.fixture(scope="module")
def runs(toy_session_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    fleet = FitConfig(n_latents=(32, 48), k=(4,), seed=(1, 2), batch_size=256, rows=2000)
    return [find_run(r.digest, folder) for r in fit(toy_session_store, fleet, folder)]


def test_runs_side_by_side(toy_session_store, runs):
    numbers = evaluate(runs[0], toy_session_store)
    done = []
    found = compare.compare(runs, on_pair=lambda: done.append(1))
    assert [row["digest"] for row in found["runs"]] == [run.digest for run in runs]
    assert found["runs"][0]["max_cosine"] == numbers["max_cosine"] and found["runs"][1]["max_cosine"]["median"] > 0
    assert found["runs"][0]["explained_variance_no_special"] == numbers["explained_variance_no_special"]
    assert found["runs"][1]["fvu"] == runs[1].result["held_out"]["fvu"]
    matched = [pair["stability"] for pair in found["pairs"] if "stability" in pair]
    split = {(pair["a"], pair["b"]) for pair in found["pairs"] if "splitting" in pair}
    small, large = ({r.digest for r in runs if r.config.n_latents == n} for n in (32, 48))
    assert len(done) == 6 and len(matched) == 2 and split == set(itertools.product(small, large))
    assert found["pw_mcc"] == pytest.approx(np.mean([m["decoder"]["mean"] for m in matched]))
    assert compare.compare(runs, pairs=False)["pairs"] == []
    assert compare.compare(list(reversed(runs)))["pw_mcc"] == pytest.approx(found["pw_mcc"])


def test_a_run_named_twice_is_a_slip(runs):
    with pytest.raises(UsageError, match="twice"):
        compare.compare([runs[0], runs[0]])
