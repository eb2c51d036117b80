"""Evaluation and export of finished runs, on the embedded model's own activations."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TINY
from safetensors.torch import load_file

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import UsageError
from trainer import FitConfig, find_run, fit, load_sae
from trainer.evaluate import evaluate
from trainer.formats import export_run, format_names
from trainer.sources import as_sources


@pytest.fixture(scope="module")
def tiny(tiny_corpus, tmp_path_factory):
    """A store of the embedded model and two SAEs: (store, runs folder, runs)."""
    folder = tmp_path_factory.mktemp("tiny")
    request = CaptureRequest(
        model=str(TINY), hooks=("blocks.2.hook_resid_pre",), corpus=(tiny_corpus,), rows=12_000, stores=folder / "stores"
    )
    store = open_store(capture(request)[0], request.stores)
    results = fit(store, FitConfig(n_latents=(256,), k=(8, 16), batch_size=512, holdout=0.1), folder / "runs")
    return store, folder / "runs", [find_run(r.digest, folder / "runs") for r in results]


def test_evaluate_repeats_the_fits_numbers_and_measures_other_stores(tiny):
    store, _, (run, _) = tiny
    numbers = evaluate(run, store)
    assert numbers["explained_variance"] == pytest.approx(run.result["held_out"]["explained_variance"])
    assert numbers["held_out"] and numbers["dead_window_rows"] == run.config.dead_after_rows
    assert {"explained_variance", "explained_variance_no_special", "mse_per_token", "l0", "dead_fraction", "rows"} <= set(numbers)


def test_evaluate_refuses_another_width(tiny, toy_session_store):
    with pytest.raises(UsageError, match="width 32"):
        evaluate(tiny[2][0], toy_session_store)


@pytest.mark.parametrize("name", format_names())
def test_exports_refuse_a_full_folder(tiny, tmp_path, name):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        export_run(tiny[2][0], name, tmp_path, lambda: as_sources(tiny[0]))
    assert (tmp_path / "mine").exists()


def test_the_saelens_folder_computes_the_same_by_saelens_formulas(tiny, tmp_path):
    """sae_lens 6.54.12's TopK, restated: h = (x - b_dec) W_enc + b_enc, ReLU of the k largest, f W_dec + b_dec."""
    store, runs, (run, _) = tiny
    export_run(run, "saelens", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    w = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert w["W_enc"].shape == (config["d_in"], config["d_sae"]) == (192, 256)
    assert config["metadata"]["sae_lens_version"] >= "6.0.0" and config["metadata"]["hook_name"] == "blocks.2.hook_resid_pre"
    x = torch.from_numpy(store[:400].copy())
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    top = h.topk(config["k"], dim=1)
    f = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
    sae = load_sae(run.digest, runs)
    torch.testing.assert_close(f, sae.encode(x).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(f @ w["W_dec"] + w["b_dec"], sae.decode(sae.encode(x)).detach(), rtol=1e-4, atol=1e-3)


def test_an_unknown_format_lists_the_known_ones(tiny, tmp_path):
    with pytest.raises(UsageError, match="no format") as caught:
        export_run(tiny[2][0], "nope", tmp_path / "x")
    assert "saelens" in caught.value.do
