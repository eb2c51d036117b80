"""Features: what the one pass keeps of each latent, against the same computed densely, and what is kept in the run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, write_jsonl

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import FormatError, UsageError
from trainer import FitConfig, find_run, fit, load_sae
from trainer.checkpoint import read_run
from trainer.features import AFTER, BEFORE, BINS, SAMPLED, STRONGEST, load_features, search_latents
from trainer.scan import features_of
from trainer.sources import aligned, as_sources

ROWS = 5_000


@pytest.fixture(scope="module")
def made(tiny_corpus, tmp_path_factory):
    """A store of the embedded model, and a TopK and a ReLU SAE: (store, runs)."""
    folder = tmp_path_factory.mktemp("features")
    lines = tiny_corpus.read_text().splitlines()
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({**json.loads(s), "meta": {"set": "ab"[i % 2]}}) + "\n" for i, s in enumerate(lines)))
    request = CaptureRequest(
        model=str(TINY), hooks=("blocks.2.hook_resid_pre",), corpus=(corpus,), rows=6_000, stores=folder / "stores"
    )
    store = open_store(capture(request)[0], request.stores)
    results = fit(
        store,
        FitConfig(arch=("topk", "relu_l1"), n_latents=(128,), k=(8,), batch_size=128, epochs=3, holdout=0.1),
        folder / "runs",
    )
    return store, [find_run(r.digest, folder / "runs") for r in results], corpus


@pytest.fixture(scope="module")
def found(made):
    store, runs, corpus = made
    return features_of(runs, lambda run: as_sources(store), rows=ROWS, model=str(TINY), corpus=(corpus,), subset_field="meta.set")


@pytest.fixture(scope="module", params=[0, 1], ids=["topk", "relu_l1"])
def one(request, made, found):
    """Features, and the dense codes of the rows counted, 0 elsewhere: (features, codes, store)."""
    store, runs, _ = made
    x = torch.from_numpy(store[:].copy())
    with torch.no_grad():
        codes = load_sae(runs[request.param].path).encode(x).numpy()
    codes[store.read("positions", 0, store.rows) < 1] = 0
    return found[request.param], codes, store


def test_counts_and_histograms_are_those_of_the_dense_codes(one):
    features, codes, store = one
    looked = codes[:ROWS]
    assert features.record.rows_counted == ROWS - (store.read("positions", 0, ROWS) < 1).sum()
    assert (np.abs(features.arrays["counts"] - (looked > 0).sum(0)) <= 1).all()  # rounding at a threshold
    np.testing.assert_allclose(features.arrays["sums"], looked.sum(0), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(features.maxima, looked.max(0), rtol=1e-4)
    documents = store.read("documents", 0, ROWS)
    for j in range(0, 128, 17):
        active = looked[:, j][looked[:, j] > 0]
        assert abs(features.arrays["documents"][j] - len(np.unique(documents[looked[:, j] > 0]))) <= 1
        top = features.arrays["tops"][j]
        assert not len(active) or top / 2 <= active.max() < top
        counts, _ = np.histogram(active, np.linspace(0, top, BINS + 1))
        assert np.abs(features.arrays["histogram"][j] - counts).sum() <= 2


def test_the_strongest_contexts_are_the_best_of_each_document(one):
    features, codes, store = one
    documents = store.read("documents", 0, ROWS)
    for j in range(0, 128, 11):
        best = sorted((codes[:ROWS, j][documents == d].max() for d in np.unique(documents)), reverse=True)
        best = [v for v in best if v > 0][:STRONGEST]
        latent = features.latent(j, store)
        np.testing.assert_allclose([c.value for c in latent.strongest], best, rtol=1e-4)
        assert len({c.document for c in latent.strongest}) == len(latent.strongest)


def test_contexts_hold_the_text_of_their_sequence_and_the_activation_of_each_token(one):
    features, codes, store = one
    positions, tokens = store.read("positions", 0, store.rows), store.read("tokens", 0, store.rows)
    for j in range(128):
        for c in (latent := features.latent(j, store)).strongest + latent.sampled:
            first = c.row - c.peak
            window = range(first, first + len(c.tokens))
            assert c.tokens == [store.vocabulary.text(t) for t in tokens[window]]
            assert (np.diff(positions[window]) == 1).all() and c.peak == min(BEFORE, positions[c.row])
            at_end = first + len(c.tokens) == store.rows or positions[first + len(c.tokens)] == 0
            assert at_end or len(c.tokens) - c.peak == AFTER + 1
            np.testing.assert_allclose(c.activations, np.maximum(codes[window, j], 0), rtol=2e-3, atol=1e-3)
            assert c.activations[c.peak] == pytest.approx(c.value, rel=1e-3)


def test_the_sample_is_uniform(one):
    """Of latents active far more often than the sample is large: by value and by place, drawn ones rank like uniform ones."""
    features, codes, store = one
    ranks, places = [], []
    for j in range(128):
        rows = np.flatnonzero(codes[:ROWS, j] > 0)
        active = np.sort(codes[rows, j])
        drawn = features.latent(j, store).sampled
        assert len(drawn) == min(SAMPLED, features.arrays["counts"][j]) and len({c.row for c in drawn}) == len(drawn)
        assert [c.value for c in drawn] == sorted((c.value for c in drawn), reverse=True)
        if len(active) > 3 * SAMPLED:
            ranks += (np.searchsorted(active, [c.value for c in drawn]) / len(active)).tolist()
            places += (np.searchsorted(rows, [c.row for c in drawn]) / len(rows)).tolist()
            assert np.mean([abs(c.quantile - r) for c, r in zip(drawn, ranks[-SAMPLED:], strict=True)]) < 0.25
    assert len(ranks) > 500
    for found in (ranks, places):  # mean and spread of a uniform variable, within 4 standard errors
        assert abs(np.mean(found) - 0.5) < 4 / np.sqrt(12 * len(found)) + 0.01 and abs(np.std(found) - 12**-0.5) < 0.02


def test_quantile_bins_cover_the_sample_in_order(one):
    latent = one[0].latent(int(one[0].arrays["counts"].argmax()), one[2])
    bins = latent.by_quantile(5, 2)
    assert [len(b) for b in bins] == [2] * 5
    assert bins[0][0].value == latent.sampled[0].value and bins[0][-1].value >= bins[1][0].value


def test_coactive_latents_are_the_largest_jaccard_indices(one):
    features, codes, _ = one
    active = (codes[:ROWS] > 0).astype(np.float64)
    together = active.T @ active
    jaccard = together / np.maximum(1, together.diagonal()[:, None] + together.diagonal()[None] - together)
    jaccard[(together < 3) | np.eye(128, dtype=bool)] = 0
    np.testing.assert_allclose(features.arrays["jaccard"], -np.sort(-jaccard, axis=1)[:, :8], atol=2e-2)
    others = features.arrays["coactive"]
    np.testing.assert_allclose(np.take_along_axis(jaccard, np.maximum(others, 0), 1)[others >= 0],
                               features.arrays["jaccard"][others >= 0], atol=2e-2)  # fmt: skip


def test_subsets_are_those_of_the_corpus(one):
    features, codes, store = one
    of = store.read("documents", 0, ROWS) % 2  # the fixture's corpus alternates
    assert features.record.subsets == ["a", "b"] and features.arrays["subset_rows"].sum() == features.record.rows_counted
    expected = np.stack([(codes[:ROWS][of == s] > 0).sum(0) for s in (0, 1)], 1)
    assert np.abs(features.arrays["subsets"] - expected).max() <= 1


def test_logit_effects_are_those_of_the_unembedding(one):
    """GPT-2: a LayerNorm before a tied unembedding; restated densely."""
    from safetensors.torch import load_file

    features, _, store = one
    weights = load_file(TINY / "model.safetensors")
    norm, head = (next(v.float() for k, v in weights.items() if k.endswith(end)) for end in ("ln_f.weight", "wte.weight"))
    W_dec = load_sae(features.run.path).W_dec.detach()
    logits = ((W_dec - W_dec.mean(1, keepdim=True)) * norm) @ head.T
    logits -= logits.mean(1, keepdim=True)
    np.testing.assert_allclose(features.arrays["promoted_logits"], logits.topk(10).values, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features.arrays["suppressed_logits"], -(-logits).topk(10).values, rtol=1e-3, atol=1e-4)
    latent = features.latent(3, store)
    assert latent.promoted[0][0] == store.vocabulary.text(int(logits[3].argmax())) and latent.suppressed[0][1] < 0


def test_features_are_kept_in_the_run_and_free_to_ask_for_again(made, found):
    _, runs, _ = made

    def gone(run):
        raise AssertionError("no store is needed")

    for again in (features_of(runs, gone), features_of(runs, gone, rows=ROWS, model=str(TINY))):
        for a, b in zip(again, found, strict=True):
            assert a.record == b.record and all((a.arrays[name] == array).all() for name, array in b.arrays.items())


def test_crosscoders_and_transcoders_have_features(toy_request, tmp_path):
    request = toy_request(hooks=("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"))
    a, b = (open_store(digest, request.stores) for digest in capture(request))
    for sources in (aligned([a, b]), aligned([a], [b])):
        (result,) = fit(sources, FitConfig(arch="batchtopk", n_latents=16, k=2, batch_size=128, holdout=0.1), tmp_path / "runs")
        run = find_run(result.digest, tmp_path / "runs")
        (features,) = features_of([run], lambda run, sources=sources: sources)
        codes = load_sae(run.path).encode(sources.take(np.arange(a.rows)).x).detach().numpy()
        codes[a.read("positions", 0, a.rows) < 1] = 0
        np.testing.assert_allclose(features.arrays["sums"], codes.sum(0), rtol=1e-3, atol=1e-3)
        assert features.latent(0, a).neighbours and features.record.logits is None


def test_what_does_not_belong_to_the_store_is_refused(made, found, tmp_path):
    store, runs, _ = made
    opener = lambda run: as_sources(store)  # noqa: E731
    other = write_jsonl(tmp_path / "other.jsonl", ["another text"])
    with pytest.raises(UsageError, match="not the corpus"):
        features_of(runs, opener, rows=100, corpus=(other,))
    with pytest.raises(UsageError, match="has 0 values"):
        features_of(runs, opener, rows=100, corpus=(made[2],), subset_field="no.such")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((TINY / name).read_bytes() + b" " * (name == "config.json"))
    with pytest.raises(UsageError, match="not the model"):
        features_of(runs, opener, model=str(tmp_path / "model"))
    with pytest.raises(UsageError, match="no latent 128"):
        found[0].latent(128, store)


def test_a_run_alone_has_the_features_it_has_in_a_fleet(made, found, tmp_path):
    store, runs, corpus = made
    run = read_run(shutil.copytree(runs[1].path, tmp_path / runs[1].digest, ignore=shutil.ignore_patterns("features*")))
    (alone,) = features_of([run], lambda run: as_sources(store), rows=ROWS, corpus=(corpus,), subset_field="meta.set")
    assert all((found[1].arrays[name] == array).all() for name, array in alone.arrays.items())


def test_other_rows_are_computed_anew_and_the_old_file_goes(made, tmp_path):
    store, runs, _ = made
    (copied,) = (shutil.copytree(run.path, tmp_path / run.digest) for run in runs[:1])
    run = read_run(copied)
    for rows in (700, 900):
        (features,) = features_of([run], lambda run: as_sources(store), rows=rows)
        assert features.record.rows == rows and len(list(copied.glob("features-*"))) == 1
    next(copied.glob("features-*")).write_bytes(b"x" * 100)
    with pytest.raises(FormatError, match="digest"):
        load_features(run)


def test_search_finds_the_latents_that_fire_on_a_text(made, found):
    store, features = made[0], found[0]
    hits = search_latents(features, store, "IMPORT")
    expected = {}
    for j in range(128):
        latent = features.latent(j, store)
        n = sum(_touches(c, "import") for c in latent.strongest + latent.sampled)
        expected |= {j: n} if n else {}
    assert hits and dict(hits) == expected and [n for _, n in hits] == sorted(expected.values(), reverse=True)
    with pytest.raises(UsageError, match="no text"):
        search_latents(features, store, " ")


def _touches(context, text):
    """Whether an occurrence of a text takes in any part of the token a context is about."""
    whole, start = context.text.lower(), len("".join(context.tokens[: context.peak]))
    end, at = start + len(context.tokens[context.peak]), whole.find(text)
    while at >= 0:
        if at < end and at + len(text) > start:
            return True
        at = whole.find(text, at + 1)
    return False
