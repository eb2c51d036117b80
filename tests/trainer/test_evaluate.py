"""Evaluations kept in the run, and the loss with an SAE spliced in, restated with plain transformers and its own hooks."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, TINY, write_jsonl
from transformers import AutoModelForCausalLM

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import FormatError, KeyMismatch, UsageError
from trainer import FitConfig, find_run, fit
from trainer.checkpoint import load_sae, run_sources
from trainer.evaluate import FOLDER, evaluate, evaluations, held_out_numbers
from trainer.sources import aligned
from trainer.splice import model_loss, open_model, sequences_of

RESID, MLP, ATTENTION = "blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.2.attn.hook_z"
FIT = FitConfig(n_latents=(64,), k=(4,), batch_size=256, holdout=0.3)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """(folder, request, stores by hook point) of the embedded model; `blocks.1…` with centred rows."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = (ROOT / "actstore" / "durable.py").read_text()  # the model knows Python
    corpus = write_jsonl(folder / "corpus.jsonl", [text[at : at + 150] for at in range(0, len(text), 150)])
    request = CaptureRequest(
        model=str(TINY), hooks=(RESID, MLP, ATTENTION), corpus=(corpus,), rows=1500, seq_len=48, stores=folder / "stores"
    )
    found = capture(request) + capture(replace(request, hooks=("blocks.1.hook_resid_pre",), center=True))
    stores = [open_store(digest, request.stores) for digest in found]
    return folder, request, {store.key.hook: store for store in stores}


@pytest.fixture(scope="module")
def runs(captured):
    folder, _, stores = captured
    return {hook: find_run(fit(store, FIT, folder / "runs")[0].digest, folder / "runs") for hook, store in stores.items()}


@pytest.fixture
def run(captured, runs, tmp_path):
    """A copy of the residual stream's run, to be changed."""
    shutil.copytree(runs[RESID].path, tmp_path / runs[RESID].digest)
    shutil.rmtree(tmp_path / runs[RESID].digest / FOLDER, ignore_errors=True)
    return find_run(runs[RESID].digest, tmp_path)


def test_the_same_evaluation_again_is_free_and_another_is_not(captured, run):
    store, asked = captured[2][RESID], []
    first = evaluate(run, store, on_rows=lambda *progress: asked.append(progress))
    assert asked == [("rows", first["rows"], first["rows"])] and first["held_out"]
    assert evaluate(run, store, on_rows=lambda *progress: pytest.fail("measured again")) == first
    assert evaluate(run, store, rows=50)["rows"] == 50
    assert [e.rows_measured for e in evaluations(run)] == [first["rows"], 50]
    assert held_out_numbers(run)["nmse_per_token"] == first["nmse_per_token"]
    assert first["dead_window_rows"] == run.config.dead_after_rows
    assert sum(first["max_cosine"]["latents"]) == 64


def test_rows_that_a_fit_leaves_out_are_measured_too(captured, tmp_path):
    store = captured[2][RESID]
    (result,) = fit(store, replace(FIT, skip_positions=8), tmp_path)
    run = find_run(result.digest, tmp_path)
    numbers = evaluate(run, store)
    assert numbers["rows"] > run.result["held_out"]["rows"] and numbers["rows_no_special"] < numbers["rows"]


def test_an_evaluation_of_another_sae_or_a_damaged_one_is_not_believed(captured, run):
    store = captured[2][RESID]
    first = evaluate(run, store)
    (path,) = (run.path / FOLDER).iterdir()
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "sae_sha256": "0" * 64, "numbers": {"rows": 1}}))
    assert evaluate(run, store) == first
    path.write_text(json.dumps({**content, "more": 1}))
    with pytest.raises(FormatError, match="more"):
        evaluations(run)


def restated(sae, store, hook, center, rows):
    """Losses of the whole model over some rows: transformers, torch's own hooks, one sequence at a time, loops."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    layer = model.transformer.h[int(hook.split(".")[1])]
    mean = torch.tensor(store.statistics.mean, dtype=torch.float32)
    special, rows = set(store.vocabulary.special), set(rows)
    sums = {}
    starts = [i for i, p in enumerate(store.read("positions", 0, store.rows).tolist()) if p == 0] + [store.rows]
    for first, last in itertools.pairwise(starts):
        ids = torch.from_numpy(store.read("tokens", first, last).astype(np.int64))
        plain = torch.tensor([i > 0 and int(t) not in special for i, t in enumerate(ids)])

        def logits(change, ids=ids):
            if hook.endswith("mlp_out"):
                handle = layer.mlp.register_forward_hook(lambda m, a, out: change(out))
            else:
                module = layer.attn.c_proj if "attn" in hook else layer
                handle = module.register_forward_pre_hook(lambda m, a: (change(a[0]), *a[1:]))
            with torch.no_grad():
                found = model(ids[None]).logits[0].double().log_softmax(-1)
            handle.remove()
            return found

        def sae_of(x):
            m = x.mean(-1, keepdim=True) if center else 0
            return sae.decode(sae.encode((x - m)[0]))[None] + m

        def average(x):
            return mean.expand_as(x) + (x.mean(-1, keepdim=True) if center else 0)

        passes = {
            "original": logits(lambda x: x), "sae": logits(sae_of), "zero_ablation": logits(torch.zeros_like),
            "mean_ablation": logits(average),
        }  # fmt: skip
        kept_special = logits(lambda x, plain=plain: torch.where(plain[None, :, None], sae_of(x), x))
        for i in range(len(ids)):
            if first + i not in rows:
                continue
            for suffix in ("", "_no_special") if plain[i] else ("",):
                for name, found in passes.items():
                    found = kept_special if name == "sae" and suffix else found
                    p, q = passes["original"][i], found[i]
                    sums.setdefault(f"kl_{name}{suffix}", []).append(float(F.kl_div(q, p, log_target=True, reduction="sum")))
                    if i + 1 < len(ids):
                        sums.setdefault(f"ce_{name}{suffix}", []).append(-float(q[ids[i + 1]]))
    return sums


@pytest.mark.parametrize("hook", [RESID, MLP, ATTENTION, "blocks.1.hook_resid_pre"])
def test_losses_equal_plain_transformers(captured, runs, hook):
    store, run = captured[2][hook], runs[hook]
    numbers = evaluate(run, store, rows=150, model=TINY, with_model=True)
    sums = restated(load_sae(run.path), store, hook, store.key.center, held_out(run, store)[:150])
    for name, values in sums.items():
        if name.startswith("kl_original"):
            continue
        assert numbers[name] == pytest.approx(np.mean(values), rel=1e-4), name
    for s in ("", "_no_special"):
        assert (numbers[f"ce_rows{s}"], numbers[f"kl_rows{s}"]) == (len(sums[f"ce_sae{s}"]), len(sums[f"kl_sae{s}"]))
        ce = {name: np.mean(sums[f"ce_{name}{s}"]) for name in ("original", "sae", "zero_ablation")}
        score = (ce["zero_ablation"] - ce["sae"]) / (ce["zero_ablation"] - ce["original"])
        assert numbers[f"ce_score{s}"] == pytest.approx(score, rel=1e-3)
        assert numbers[f"kl_score{s}"] == pytest.approx(
            1 - np.mean(sums[f"kl_sae{s}"]) / np.mean(sums[f"kl_zero_ablation{s}"]), rel=1e-4
        )
    assert numbers["kl_rows"] == 150 > numbers["kl_rows_no_special"] and numbers["ce_sae"] > numbers["ce_original"] > 0
    assert held_out_numbers(run)["ce_score"] == numbers["ce_score"]


def held_out(run, store):
    from trainer.batches import split_rows

    return split_rows(store, run.config).held_out.tolist()


def test_a_transcoder_is_spliced_in_where_it_writes(captured):
    folder, _, stores = captured
    sources = aligned([stores[RESID]], [stores[MLP]])
    run = find_run(fit(sources, FIT, folder / "transcoders")[0].digest, folder / "transcoders")
    backend = open_model(stores[RESID], TINY, "cpu")
    sae = load_sae(run.path)
    numbers = model_loss(backend, sae, run_sources(run, lambda d: open_store(d, folder / "stores")), range(96))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.zero_()
    nothing = model_loss(backend, sae, sources, range(96))
    assert numbers["ce_sae"] != pytest.approx(numbers["ce_zero_ablation"])
    assert nothing["ce_sae"] == pytest.approx(nothing["ce_zero_ablation"]) and nothing["kl_score"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UsageError, match="crosscoder"):
        model_loss(backend, sae, aligned([stores[RESID], stores[MLP]]), range(10))


def test_the_model_must_be_the_stores_own(captured, toy_session_store, tmp_path, monkeypatch):
    store = captured[2][RESID]
    other = shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-4}))
    with pytest.raises(KeyMismatch, match="have digest"):
        open_model(store, other, "cpu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="called 'tiny-gpt2'") as caught:
        open_model(store, None, "cpu")
    assert "--model FOLDER" in caught.value.do
    monkeypatch.chdir(TINY.parent)
    assert open_model(store, None, "cpu").folder == Path("tiny-gpt2")
    with pytest.raises(UsageError, match="toy"):
        open_model(toy_session_store, None, "cpu")


def test_sequences_are_rebuilt_whole_and_only_those_with_a_wanted_row(captured):
    store = captured[2][RESID]
    rows = np.array([3, 47, 48, 200, store.rows - 1])
    found = list(sequences_of(store, rows))
    assert [first for first, _ in found] == [0, 48, 192, 1488] and [len(w) for _, w in found] == [48, 48, 48, 12]
    assert np.concatenate([first + np.flatnonzero(wanted) for first, wanted in found]).tolist() == rows.tolist()
    assert sum(len(w) for _, w in sequences_of(store, range(store.rows))) == store.rows
