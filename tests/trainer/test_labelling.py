"""Labelling a run: by pattern, and by a model behind a small server; what is done stays done however it ends."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from actstore_cli.trainer import main
from click.testing import CliRunner
from endpoint import chat, sensible, serving
from helpers import ROOT, TINY

from actstore import durable
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import StorageFailed, StoreLocked, UsageError
from trainer import FitConfig, find_run, fit, load_run
from trainer.features import AFTER, BEFORE, load_features
from trainer.judge import Endpoint
from trainer.labelling import draw_windows, label_by_model, label_by_pattern
from trainer.labels import Label, read_labels, save_labels
from trainer.scan import features_of
from trainer.sources import as_sources


@pytest.fixture(scope="module")
def fitted(tiny_corpus, tmp_path_factory):
    """A store of the embedded model, and a run with features: (store, runs folder, digest).

    At the first block a row is little more than its token, so latents learned in seconds stand for something.
    """
    folder = tmp_path_factory.mktemp("labelling")
    request = CaptureRequest(
        model=str(TINY), hooks=("blocks.0.hook_resid_pre",), corpus=(tiny_corpus,), rows=12_000, stores=folder / "stores"
    )
    store = open_store(capture(request)[0], request.stores)
    (result,) = fit(store, FitConfig(n_latents=(64,), k=(4,), batch_size=512, epochs=2), folder / "runs")
    features_of([find_run(result.digest, folder / "runs")], lambda run: as_sources(store))
    return store, folder / "runs", result.digest


@pytest.fixture
def made(fitted, tmp_path):
    """Features of a run of its own, its stores, and its twenty latents of largest activation."""
    store, runs, digest = fitted
    shutil.copytree(runs, tmp_path / "runs")
    features = load_features(find_run(digest, tmp_path / "runs"))
    order = [int(i) for i in (-features.maxima).argsort(kind="stable") if features.maxima[i] > 0]
    return features, as_sources(store), order[:20]


def quick(url, model="judge-1"):
    return Endpoint(url, model, timeout_s=5.0, tries=2, pause_s=0.01)


def test_windows_lie_in_their_sequences_and_know_their_latents(made):
    features, sources, _ = made
    store, windows = sources.first, draw_windows(features, sources)
    assert len(windows) > 30 and windows == draw_windows(features, sources)
    for context, active in windows[::5]:
        first = context.row - context.peak
        rows = range(first, first + len(context.tokens))
        positions = store.read("positions", rows[0], rows[-1] + 1)
        assert np.array_equal(positions, positions[0] + np.arange(len(rows))) and len(rows) <= BEFORE + 1 + AFTER
        codes = load_run(features.run.path).sae.encode(torch.from_numpy(store[rows[0] : rows[-1] + 1].copy()))
        assert active == set(torch.nonzero((codes != 0).any(0)).flatten().tolist())


def test_labels_by_pattern_are_the_same_every_time_and_kept(made):
    features, sources, latents = made
    seen = []
    labels = label_by_pattern(features, sources, latents, lambda *a: seen.append(a))
    data = (features.run.path / "labels.json").read_bytes()
    assert [x.latent for x in labels] == latents == [i for i, _, _ in seen]
    assert label_by_pattern(features, sources, latents) == labels
    assert (features.run.path / "labels.json").read_bytes() == data
    assert np.mean([x.balanced_accuracy for x in labels if x.judged]) > 0.65  # 0.5 is a guess; measured: 0.79


def test_a_model_labels_and_judges_and_nothing_is_asked_twice(made):
    features, sources, latents = made
    with serving(sensible) as stub:
        first = label_by_model(features, sources, latents[:9], quick(stub.url))
        assert len(stub.asked) == 9 and all(
            x.model == "judge-1" and x.text.startswith("the word ") and not x.judged for x in first
        )
        again = label_by_model(features, sources, latents[:12], quick(stub.url))
        assert again[:9] == first and len(stub.asked) == 12
        scored = label_by_model(features, sources, latents[:3], quick(stub.url), scored=True)
        assert [x.text for x in scored] == [x.text for x in first[:3]]
        assert not any("LABEL:" in q["messages"][0]["content"] for q in stub.asked[12:])  # judged, not labelled again
        assert all(0 <= x.balanced_accuracy <= 1 and x.judged >= 10 for x in scored)
        n = len(stub.asked)
        assert label_by_model(features, sources, latents[:3], quick(stub.url), scored=True) == scored and len(stub.asked) == n
        other = label_by_model(features, sources, latents[:1], quick(stub.url, "judge-2"))
        assert other[0].model == "judge-2" and len(stub.asked) == n + 1
    kept = read_labels(features.run)
    assert kept[latents[0], "model"] == other[0] and kept[latents[1], "model"] == scored[1] and len(kept) == 12


def purity(latent):
    """The share of a latent's sampled activations that lie on its commonest word."""
    words = Counter(context.tokens[context.peak].strip() for context in latent.sampled)
    return max(words.values(), default=0) / max(len(latent.sampled), 1)


def test_a_judge_that_knows_the_pattern_scores_higher_than_one_that_guesses(made):
    features, sources, active = made
    latents = sorted(active, key=lambda i: -purity(features.latent(i, sources.first)))[:8]  # the stub knows nothing but words
    with serving(sensible) as stub:
        known = label_by_model(features, sources, latents, quick(stub.url), scored=True)
    guess = lambda body, n: sensible(body, n) if "LABEL:" in body["messages"][0]["content"] else (200, {}, chat("[1,0,1,0,1]"))  # noqa: E731
    with serving(guess) as stub:
        guessed = label_by_model(features, sources, latents, quick(stub.url, "guesser"), scored=True)
    mean = lambda labels: np.mean([x.balanced_accuracy for x in labels if x.balanced_accuracy is not None])  # noqa: E731
    assert mean(known) > mean(guessed) + 0.2 and abs(mean(guessed) - 0.5) < 0.1  # measured: 0.76 and 0.48


def test_labels_done_before_the_server_dies_are_kept_and_the_rest_is_asked_later(made):
    features, sources, latents = made
    with serving(lambda body, n: sensible(body, n) if n <= 13 else (500, {}, b"")) as stub, pytest.raises(StorageFailed):
        label_by_model(features, sources, latents, quick(stub.url), parallel=1)
    assert sorted(i for i, _ in read_labels(features.run)) == sorted(latents[:13])
    with serving(sensible) as stub:
        assert [x.latent for x in label_by_model(features, sources, latents, quick(stub.url))] == latents
        assert len(stub.asked) == 7


def test_ctrl_c_keeps_what_is_done_and_waits_for_no_server(made):
    features, sources, latents = made
    release, seen = threading.Event(), []

    def stop(latent, label, problem):
        seen.append(latent)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with serving(lambda body, n: sensible(body, n) if n <= 3 else release.wait(30) and sensible(body, n)) as stub:
        with pytest.raises(KeyboardInterrupt):
            label_by_model(features, sources, latents, quick(stub.url), on_label=stop)
        assert sorted(i for i, _ in read_labels(features.run)) == sorted(seen)
        release.set()


def test_garbage_costs_one_label_and_is_said(made):
    features, sources, latents = made
    problems = {}
    with serving(lambda body, n: (200, {}, b"<html>") if n == 2 else sensible(body, n)) as stub:
        labels = label_by_model(
            features, sources, latents[:5], quick(stub.url), parallel=1, on_label=lambda i, x, p: problems.setdefault(i, p)
        )
    assert [x.latent for x in labels] == [latents[0], *latents[2:5]]
    assert "not valid JSON" in problems.pop(latents[1]) and set(problems.values()) == {""}


def test_two_labellings_of_a_run_exclude_each_other(made):
    features, sources, latents = made
    lock = features.run.path.parent / ".locks" / f"{features.run.digest}.lock"
    with durable.lock(lock, "another"), pytest.raises(StoreLocked):
        label_by_pattern(features, sources, latents)


def test_latents_that_do_not_exist_are_refused(made):
    features, sources, _ = made
    with pytest.raises(UsageError, match="no latent 64"):
        label_by_pattern(features, sources, [64])


def command(features, sources, *args):
    stores, runs = sources.first.path.parent, features.run.path.parent
    words = ["label", features.run.digest[:12], "--stores", stores, "--runs", runs, *args]
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_by_pattern_and_by_model(made, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    features, sources, latents = made
    result = command(features, sources, "--top", 6, "--json")
    value = json.loads(result.stdout)
    assert result.exit_code == 0 and [x["latent"] for x in value["labels"]] == latents[:6] and value["failed"] == {}
    with serving(sensible) as stub:
        chosen = ",".join(map(str, latents[:2]))
        result = command(features, sources, "--latents", chosen, "--endpoint", stub.url, "--model-name", "m", "--detect")
    assert result.exit_code == 0 and "the word" in result.stdout and "score" in result.stdout
    assert "sk-secret" not in result.output + (features.run.path / "labels.json").read_text()
    with serving(lambda body, n: (404, {}, b"no such model")) as stub:
        result = command(features, sources, "--top", 1, "--endpoint", stub.url, "--model-name", "x")
    assert result.exit_code == 2 and "no such model" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args", [("--detect",), ("--endpoint", "http://127.0.0.1:1"), ("--model-name", "m"), ("--top", 1, "--latents", 1)]
)
def test_options_that_do_not_go_together(made, args):
    result = command(*made[:2], *args)
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_reports_and_features_show_labels_as_text(made):
    features, sources, latents = made
    text = '[/red]</script><img src=x onerror="alert(1)">'
    evil = Label(latent=latents[0], text=text, how="model", model="m", balanced_accuracy=0.9)
    save_labels(features.run, {(evil.latent, evil.how): evil})
    stores, runs = sources.first.path.parent, features.run.path.parent
    options = [str(word) for word in (features.run.digest[:12], "--stores", stores, "--runs", runs)]
    shown = CliRunner().invoke(main, ["features", *options, "--json"])
    listed = {x["latent"]: x["label"] for x in json.loads(shown.stdout)["latents"]}
    assert listed[latents[0]] == f"{evil.text} (0.90)" and listed[latents[1]] is None
    table = CliRunner().invoke(main, ["features", *options])
    assert table.exit_code == 0 and evil.text in table.stdout
    one = CliRunner().invoke(main, ["features", *options, "--latent", str(latents[0])])
    assert f"latent {latents[0]}  {evil.text} (0.90)" in one.stdout
    path = CliRunner().invoke(main, ["report", *options]).stdout.strip()
    html = Path(path).read_text()
    assert "onerror" in html and "<img" not in html


def test_the_lines_in_the_docs_run(made, monkeypatch):
    features, sources, latents = made
    monkeypatch.setenv("ACTSTORE_RUNS", str(features.run.path.parent))
    monkeypatch.setenv("ACTSTORE_STORES", str(sources.first.path.parent))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "labels.md").read_text(), re.DOTALL)
    code = (
        code.replace("28e4", features.run.digest)
        .replace("[7, 9]", str(latents[:2]))
        .replace("labels[7]", f"labels[{latents[0]}]")
    )
    with serving(sensible) as stub:
        exec(code.replace("http://127.0.0.1:8000", stub.url), {})
    labels = load_run(features.run.digest).labels
    assert set(labels) >= set(latents[:2]) and re.fullmatch(r"the word .* \(\d\.\d\d\)", labels[latents[0]])
