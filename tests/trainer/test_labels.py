"""Labels by pattern, on contexts made by hand; and labels.json, written, read and refused."""

from __future__ import annotations

import json

import pytest

from actstore.errors import FormatError
from trainer import FitConfig, find_run, fit
from trainer.labels import (
    MAX_TEXT,
    Label,
    background,
    clean,
    facts,
    halves,
    heuristic_label,
    read_labels,
    save_labels,
    shown_labels,
)
from trainer.latents import Context, Latent

FILLER = ["one", "day", "she", "went", "along", "with", "them", "to", "see", "how", "far", "it", "was"]


def context(words, peak, row):
    """A window of words, each a token with a space before it, around the word at `peak`; its latent is active there only."""
    tokens = [w if w.startswith((" ", "\n", "<|")) or not w else f" {w}" for w in words]
    return Context(10.0 - row / 1e6, 0.5, row, row, tokens, [float(i == peak) for i in range(len(tokens))], peak)


def latent(contexts):
    return Latent(7, 9, 0.1, 1.0, 1.0, 9, [0.0, 1.0], [9], contexts[:4], contexts[4:], [], [], [], [], {})


def around(middle, i, at=5):
    """Filler with some words put in, different for each i."""
    words = FILLER[i % 5 :] + FILLER[: i % 5]
    return words[:at] + middle + words[at:]


COMMON = background([context(around([], i), 5, 1000 * i) for i in range(40)], before=4)


@pytest.mark.parametrize(
    "middles, peak, text",
    [
        ([["bank"]], 5, "“bank”"),
        ([["bank"], ["river"]], 5, "“bank” | “river”"),
        ([[str(1900 + i)] for i in range(20)], 5, "numbers"),
        ([["Ab" + c * 3] for c in "cdefghijkmnopqrstuvx"], 5, "capitalised words"),
        ([[c * 3 + "tion"] for c in "cdefghijkmnopqrstuvx"], 5, "words in -ion"),
        ([["(" * i] for i in range(2, 22)], 5, "punctuation"),
        ([["of", c * 4] for c in "cdefghijkmnopqrstuvx"], 6, "what follows “of”"),
        ([[c * 4, "judge"] for c in "cdefghijkmnopqrstuvx"], 5, "text with “judge”"),
    ],
)
def test_the_simplest_pattern_is_the_label(middles, peak, text):
    contexts = [context(around(middles[i // 2 % len(middles)], i), peak, 100 * i) for i in range(20)]
    label = heuristic_label(latent(contexts), COMMON, before=4)
    assert label.text == text and label.how == "heuristic" and label.model is None
    assert label.balanced_accuracy > 0.9 and label.f1 > 0.9 and label.judged == 10


def test_a_sequences_beginning_is_a_pattern():
    contexts = [context([c * 3, c * 4, c * 5, *FILLER], i % 3, 100 * i) for i, c in enumerate("cdefghijkmnopqrstuvx")]
    assert heuristic_label(latent(contexts), COMMON, before=4).text == "the beginning of a sequence"


def test_a_pattern_is_scored_on_contexts_it_was_not_chosen_by():
    """All contexts that choose it have the word, a third of those that judge it: 1/3 hits, no false alarm."""
    contexts = [
        context(around(["bank"] if i % 2 == 0 or i % 6 == 1 else ["zq" + "abcdefgh"[i % 8]], i), 5, 100 * i) for i in range(24)
    ]
    label = heuristic_label(latent(contexts), COMMON, before=4)
    assert label.text == "“bank”" and label.judged == 12
    assert label.balanced_accuracy == pytest.approx((4 / 12 + 1) / 2) and label.f1 == pytest.approx(2 * (4 / 12) / (4 / 12 + 1))


def test_what_is_as_common_elsewhere_is_no_pattern():
    contexts = [context(around([], i), i % 8, 100 * i) for i in range(20)]
    label = heuristic_label(latent(contexts), COMMON, before=0)
    assert label.text == "no simple pattern" and label.balanced_accuracy == 0.5


def test_a_latent_that_is_never_active_has_no_label():
    assert heuristic_label(latent([]), COMMON, before=4) is None


def test_halves_share_no_token():
    near = [context(around(["bank"], i), 5, i) for i in range(30)]  # windows of 14 tokens that overlap
    made, rest = halves(latent(near))
    assert made and all(abs(a.row - b.row) > len(b.tokens) for a in made for b in rest)
    assert sorted(c.row for c in made) == list(range(0, 30, 2)) and rest == []
    apart = [context(around(["bank"], i), 5, 100 * i) for i in range(30)]
    assert [len(half) for half in halves(latent(apart + apart[:5]))] == [15, 15]


def test_facts_of_a_token():
    assert set(facts([" New", " York"], 1, 1, 20)) == {
        ("is", "“York”"), ("after", "“new”"), ("begins", ""), ("kind", "capitalised words"),
    }  # fmt: skip
    assert ("kind", "parts inside a word") in set(facts([" hel", "lo"], 1, 20, 20))
    assert set(facts(["\n"], 0, 30, 20)) == {("is", "“⏎”"), ("kind", "line breaks")}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a\x00b\x1b[2Jc", "a b [2Jc"),
        ("right\u202eto\u200bleft", "right to left"),
        ("  two\n lines ", "two lines"),
        ("\ud800x", "x"),
        ("x" * 1000, "x" * (MAX_TEXT - 1) + "…"),
    ],
)
def test_text_of_strangers_becomes_one_printable_line(text, wanted):
    assert clean(text) == wanted


@pytest.fixture(scope="module")
def run(toy_session_store, tmp_path_factory):
    runs = tmp_path_factory.mktemp("labels")
    (result,) = fit(toy_session_store, FitConfig(n_latents=(32,), k=(2,), batch_size=256), runs)
    return find_run(result.digest, runs)


def test_labels_are_kept_in_the_run_as_canonical_json(run):
    heuristic = Label(latent=3, text="“é” | <b>", how="heuristic", balanced_accuracy=0.75, f1=0.5, judged=9)
    model = Label(latent=3, text="accents", how="model", model="m")
    other = Label(latent=1, text="numbers", how="heuristic")
    save_labels(run, {(x.latent, x.how): x for x in (model, other, heuristic)})
    assert read_labels(run) == {(1, "heuristic"): other, (3, "heuristic"): heuristic, (3, "model"): model}
    data = (run.path / "labels.json").read_bytes()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert shown_labels(run) == {3: "accents"}  # a model's goes before a heuristic's, an unscored pattern is not shown
    save_labels(run, {(3, "heuristic"): heuristic})
    assert shown_labels(run) == {3: "“é” | <b> (0.75)"}
    assert not (run.path / "tmp").exists()
    save_labels(run, {(3, "model"): model.model_copy(update={"text": "a stranger's\x1b[2J"})})
    assert shown_labels(run) == {3: "a stranger's [2J"}


@pytest.mark.parametrize(
    "change",
    [
        {"text": "x" * (MAX_TEXT + 1)}, {"latent": -1}, {"latent": "3"}, {"how": "guess"}, {"extra": 1}, {"f1": "0.5"},
        {"judged": 1.5}, {"text": None},
    ],
)  # fmt: skip
def test_a_damaged_labels_file_is_refused(run, change):
    label = {**Label(latent=1, text="numbers", how="heuristic").model_dump(), **change}
    (run.path / "labels.json").write_text(json.dumps({"format": 1, "labels": [label]}))
    with pytest.raises(FormatError, match=r"labels\.json"):
        read_labels(run)


def test_a_run_without_labels_has_none(run):
    (run.path / "labels.json").unlink(missing_ok=True)
    assert read_labels(run) == {} and shown_labels(run) == {}
