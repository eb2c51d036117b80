"""Runs in a notebook: the numbers of the run's own files, pictures that parse, text that is escaped, docs that run."""

from __future__ import annotations

import dataclasses
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import ROOT, StopRequestError, stop_after

import trainer
from actstore.errors import StoreNotFound, UsageError
from trainer import FitConfig, fit, load_run
from trainer.scan import features_of
from trainer.sources import as_sources


@pytest.fixture(scope="module")
def made(toy_session_store, tmp_path_factory):
    """Two finished runs of a toy store, the first with features: (store, runs folder, digests)."""
    runs = tmp_path_factory.mktemp("notebook") / "runs"
    results = fit(toy_session_store, FitConfig(n_latents=(32,), k=(2, 4), batch_size=128, holdout=0.1), runs)
    digests = [r.digest for r in results]
    with torch.no_grad():
        features_of([trainer.find_run(digests[0], runs)], lambda run: as_sources(toy_session_store))
    return toy_session_store, runs, digests


def test_a_run_is_what_its_files_say(made):
    store, runs, (digest, _) = made
    run = load_run(digest[:10], runs)
    assert run.digest == digest and load_run(runs / digest) == run
    lines = (runs / digest / "metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines] and len(lines) > 5
    result = json.loads((runs / digest / "result.json").read_text())
    assert run.held_out == result["held_out"] and run.result["dead_fraction"] == result["dead_fraction"]
    assert run.config["k"] == 2 and run.lineage["store"] == store.digest
    assert run.lineage["corpus"] == store.key.corpus.digest and run.lineage["hook"] == "blocks.1.hook_resid_pre"
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.metrics = []


def test_the_sae_is_loaded_when_asked_for(made):
    store, runs, (digest, _) = made
    run, rows = load_run(digest, runs), torch.from_numpy(store[:50].copy())
    assert "sae" not in vars(run)
    assert torch.equal(run.sae.encode(rows), trainer.load_sae(digest, runs).encode(rows)) and run.sae is run.sae


def test_features_are_there_if_the_run_has_them(made):
    store, runs, (first, second) = made
    run = load_run(first, runs)
    strongest = int(np.argmax(run.features.maxima))
    found = run.latent(strongest, store.path.parent)
    assert found.maximum == pytest.approx(float(run.features.maxima.max())) and found.strongest
    assert load_run(second, runs).features is None and load_run(second, runs).latent(0) is None
    with pytest.raises(UsageError):
        run.latent(32, store.path.parent)


def svgs(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_figures_hold_the_points_they_draw(made):
    _, runs, digests = made
    one, two = (load_run(d, runs) for d in digests)
    figure = one.curves("l0", two)
    assert figure.series == {r.label: [(line["rows"], line["l0"]) for line in r.metrics] for r in (one, two)}
    (svg,) = svgs(figure._repr_html_())
    lines = svg.findall("polyline")
    assert [len(line.get("points").split()) for line in lines] == [len(one.metrics), len(two.metrics)]
    density = one.densities(two)
    assert [sum(h for _, h in points) + r.held_out["density"]["never"] for points, r in
            zip(density.series.values(), (one, two), strict=True)] == [32, 32]  # fmt: skip
    assert len(svgs(density._repr_html_())[0].findall("polygon")) == 2


def test_the_page_of_a_run_shows_its_numbers_and_is_closed_and_escaped(made):
    _, runs, (digest, _) = made
    run = load_run(digest, runs)
    html = run._repr_html_()
    assert f"{run.held_out['fvu']:.6g}" in html and digest in html and len(svgs(html)) == 3
    assert "<script" not in html and "http" not in re.sub(r'xmlns="[^"]*"', "", html)
    evil = dataclasses.replace(run, lineage={**run.lineage, "model": "<script>alert(1)</script>"})
    assert "<script>" not in evil._repr_html_() and "&lt;script&gt;" in evil._repr_html_()


def test_an_unfinished_run_can_be_looked_at(made, tmp_path):
    with pytest.raises(StopRequestError):
        fit(made[0], FitConfig(n_latents=(32,), k=(2,), batch_size=128), tmp_path, progress=stop_after(5))
    (run,) = [load_run(r.digest, tmp_path) for r in trainer.list_runs(tmp_path)]
    assert len(run.metrics) == 5 and run.result is None and "unfinished" in run._repr_html_()
    assert run.densities().svg == ""
    with pytest.raises(StoreNotFound):
        _ = run.sae


def test_the_lines_in_the_docs_run(made, monkeypatch):
    store, runs, (first, second) = made
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text(), re.DOTALL)
    monkeypatch.setenv("ACTSTORE_RUNS", str(runs))
    monkeypatch.setenv("ACTSTORE_STORES", str(store.path.parent))
    scope = {"rows": torch.from_numpy(store[:20].copy())}
    exec(code.replace("3fa9", first[:12]).replace("77e1", second[:12]), scope)
    assert scope["codes"].shape == (20, 32) and scope["latent"].index == 7
