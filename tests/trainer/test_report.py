"""The report: what is in the file, and what a person does with it, in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import zlib
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from harness.browser import browser, chromium
from helpers import TINY, cannot, write_jsonl
from safetensors.numpy import load

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import StoreNotFound, UsageError
from trainer import FitConfig, find_run, fit
from trainer.features import load_features
from trainer.inlined import deflated
from trainer.report import write_report
from trainer.sources import as_sources

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> <!-- <b>&amp; "


@pytest.fixture(scope="module")
def made(tiny_corpus, tmp_path_factory):
    """A store whose corpus attacks the page, with two SAEs: (store, runs)."""
    folder = tmp_path_factory.mktemp("report")
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()[:12]]
    corpus = write_jsonl(folder / "corpus.jsonl", [HOSTILE * 5 + text for text in texts])
    request = CaptureRequest(
        model=str(TINY), hooks=("blocks.2.hook_resid_pre",), corpus=(corpus,), rows=4_000, stores=folder / "stores"
    )
    store = open_store(capture(request)[0], request.stores)
    results = fit(store, FitConfig(n_latents=(64,), k=(4, 8), batch_size=512, holdout=0.1), folder / "runs")
    return store, [find_run(r.digest, folder / "runs") for r in results]


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
    store, runs = made
    labels = {runs[0].digest: {3: "hostile <i>label</i>"}}
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(runs, lambda run: as_sources(store), out, model=str(TINY), labels=labels)


class Parsed(HTMLParser):
    """Collects tags, links and the text of each script by id; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.open, self.scripts, self.text = [], [], [], {}, ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        if tag not in ("meta", "br", "line", "polyline", "polygon", "input"):
            self.open.append((tag, dict(attrs).get("id", "")))

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline", "polygon"):
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1]] = data
        self.text += data


def block(page, name):
    return zlib.decompress(base64.b64decode(page.scripts[f"block-{name}"]), wbits=-15)


def test_the_report_is_one_file_with_everything_in_it(made, report):
    store, runs = made
    text = report.read_text()
    page = Parsed(text)
    assert not page.links and page.tags.count("svg") == 5 and len(text) < 1_000_000
    for run in runs:
        assert run.digest in page.text and f"{run.result['held_out']['fvu']:.4g}" in page.text
        assert f"trainer fit --store {store.digest[:12]} --arch topk --n-latents 64 --k {run.config.k}" in page.text
    assert (
        "actstore capture --model MODEL_FOLDER --hook blocks.2.hook_resid_pre --corpus CORPUS_FILE --text-field text "
        "--bad-lines error --seq-len 128 --packing pack --bos --rows 4000 --dtype float32 --compute-dtype float32 "
        "--backend transformers\n"
    ) in page.text


def test_the_command_of_the_lineage_makes_the_same_run_again(made, report):
    store, runs = made
    commands = re.findall("^trainer (fit .*)$", Parsed(report.read_text()).text, flags=re.M)
    for run, command in zip(runs, commands, strict=True):
        folders = ["--stores", str(store.path.parent), "--runs", str(run.path.parent)]
        done = CliRunner().invoke(trainer_main, [*shlex.split(command), *folders])
        assert done.stdout.split() == [run.digest] and "nothing to do" in done.stderr


def test_only_our_script_may_run_and_nothing_is_loaded(report):
    text = report.read_text()
    page = Parsed(text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    digest = base64.b64encode(hashlib.sha256(page.scripts[""].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "hacked" not in text and "<img" not in text and "<i>" not in text and text.count("<script>") == 1


def test_blocks_hold_the_features(made, report):
    store, runs = made
    page, features = Parsed(report.read_text()), load_features(runs[0])
    table, details, words = load(block(page, "table0")), load(block(page, "latents0.0")), json.loads(block(page, "words0"))
    text = load(block(page, "text0"))
    np.testing.assert_allclose(table["density"], features.density, rtol=3e-4)
    np.testing.assert_allclose(table["maximum"], features.maxima, rtol=3e-4)
    latent = features.latent(int(features.arrays["counts"].argmax()), store)
    expected = latent.strongest[:8] + [c for part in latent.by_quantile(5, 3) for c in part]
    rows = [r for r in details["rows"][latent.index].tolist() if r >= 0]
    assert [words[str(text["tokens"][r])] for r in rows] == [c.tokens[c.peak] for c in expected]
    assert [int(text["documents"][r]) for r in rows] == [c.document for c in expected]


def test_a_block_cannot_end_its_element():
    assert not set(deflated(HOSTILE.encode() * 9)) & set("<>&\"'")


def test_runs_that_cannot_be_shown(made, tmp_path):
    _, runs = made

    def gone(run):
        raise StoreNotFound("gone")

    text = write_report(runs, gone, tmp_path / "r.html").read_text()  # the features are in the runs
    assert "block-table0" in text and "block-text0" not in text
    with pytest.raises(UsageError, match="no run"):
        write_report([], gone, tmp_path / "r.html")


# --- in Chromium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if chromium() is None:
        cannot("no Chromium is installed (Debian: apt-get install chromium)")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab, report):
    tab.look()
    tab.open(report)
    yield tab
    assert not tab.errors and all(url.startswith(("file:", "about:")) for url in tab.loads)
    assert not tab.run("window.hacked")


def column(page, n):
    return page.run(f"[...document.querySelectorAll('#rows tr')].map((r) => r.children[{n}].textContent)")


def test_the_table_sorts(made, page):
    features = load_features(made[1][0])
    assert column(page, 0) == [str(i) for i in range(25)]
    page.run("document.querySelector('[data-sort=maximum]').click()")
    assert column(page, 0) == [str(i) for i in np.argsort(-features.maxima, kind="stable")[:25]]
    page.run("document.querySelector('[data-sort=maximum]').click()")
    assert column(page, 0) == [str(i) for i in np.argsort(features.maxima, kind="stable")[:25]]
    assert page.run("document.querySelector('[aria-sort=ascending]').textContent") == "largest"


def test_the_keyboard_alone_searches_opens_and_goes_on(made, page):
    store, runs = made
    features = load_features(runs[0])
    page.press("/")
    page.type("hostile")
    page.press("Enter")
    assert column(page, 0) == ["3"] and "hostile <i>label</i>" in column(page, 1)[0]
    page.press("/")
    page.run("document.querySelector('#search').select()")
    best = {i: [c.tokens[c.peak] for c in features.latent(i, store).strongest[:8]] for i in range(64)}
    words = Counter(t.strip().lower() for tokens in best.values() for t in tokens if t.strip().isalpha() and len(t.strip()) > 2)
    word = words.most_common(1)[0][0]
    found = [i for i, tokens in best.items() if any(word in t.lower() for t in tokens)][:25]
    page.type(word)
    shown = "JSON.stringify([...document.querySelectorAll('#rows tr')].map((r) => Number(r.children[0].textContent)))"
    page.wait(f"{shown} == {json.dumps(json.dumps(found, separators=(',', ':')))}")
    page.press("ArrowDown")
    page.press("Enter")
    assert page.run("document.querySelector('dialog').open")
    assert page.run("document.querySelector('#title').textContent") == f"latent {found[0]}"
    if len(found) > 1:
        page.press("ArrowRight")
        assert page.run("document.querySelector('#title').textContent") == f"latent {found[1]}"
        page.press("ArrowLeft")
    page.press("Escape")
    assert not page.run("document.querySelector('dialog').open")
    assert page.run("document.activeElement.dataset.latent") == str(found[0])
    page.press("/")
    page.press("Escape")
    page.wait("document.querySelectorAll('#rows tr').length == 25")
    page.run("document.querySelector('#rows tr').focus()")
    page.press("PageDown")
    assert column(page, 0)[0] == "25"


def test_a_latent_shows_its_contexts_with_the_activation_of_each_token(made, page, report):
    store, runs = made
    features = load_features(runs[1])
    latent = features.latent(int(features.arrays["counts"].argmax()), store)
    page.open(report, f"#{runs[1].digest[:12]}/{latent.index}")
    page.wait("document.querySelector('dialog').open")
    texts = page.run("[...document.querySelectorAll('.contexts .strip')].map((s) => s.textContent)")
    contexts = latent.strongest[:8] + [c for part in latent.by_quantile(5, 3) for c in part]
    assert texts == [c.text.replace("\n", "⏎").replace("\t", "⇥") for c in contexts]
    spans = "[...document.querySelector('.strip').querySelectorAll('span')]"
    coloured = page.run(f"{spans}.map((t) => t.style.backgroundColor !== '')")
    assert coloured == [a > contexts[0].value / 510 for a in contexts[0].activations]
    promoted = page.run("[...document.querySelectorAll('#side .tokens')[0].children].map((t) => t.textContent)")
    assert promoted == [t.replace("\n", "⏎").replace("\t", "⇥") for t, _ in latent.promoted]
    assert page.run("document.querySelectorAll('#side .bar').length") >= 12
    page.run("document.querySelector('.others button').click()")
    assert page.run("document.querySelector('#title').textContent") == f"latent {latent.neighbours[0][0]}"


def test_text_around_is_searched_and_hostile_text_stays_text(made, page):
    store, runs = made
    page.run("document.querySelector('#deep').click()")
    page.press("/")
    page.run("document.querySelector('#search').focus()")
    page.type("<script>window")
    page.press("Enter")
    found, features = column(page, 0), load_features(runs[0])
    shown = lambda one: one.strongest[:8] + [c for part in one.by_quantile(5, 3) for c in part]  # noqa: E731
    assert found == [str(i) for i in range(64) if any("<script>window" in c.text for c in shown(features.latent(i, store)))][:25]
    page.press("Enter")
    assert "<script>window" in page.run("document.querySelector('#texts').textContent")
    assert page.run("document.querySelectorAll('#texts script, #texts img, #rows img').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(page, dark):
    page.look(390, 844, dark=dark)
    assert page.run("document.documentElement.scrollWidth") == 390
    page.run("document.querySelector('#rows tr').click()")
    assert page.run("document.querySelector('dialog').getBoundingClientRect().width") == 390
    assert page.run("document.querySelector('#body').scrollWidth <= document.querySelector('#body').clientWidth")
    ink, paper = page.run("['color', 'backgroundColor'].map((n) => getComputedStyle(document.body)[n])")
    assert (ink > paper) == dark or ink != paper
