"""Labels of latents, as kept in a run (`labels.json`), and the ones that need no model: what their contexts share.

A heuristic label is the simplest pattern that tells a latent's peaks from other tokens: the token itself, its kind (a
number, a capital, …), the word before it, or words around it. It is found on half of the latent's contexts and scored
on the other half, so the score is what the pattern is worth on text it was not chosen by.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from actstore import durable
from actstore.key import Strict
from trainer.checkpoint import Run
from trainer.latents import Context, Latent
from trainer.saved import Count, read_record

LABELS = "labels.json"
MAX_LABELS_BYTES = 32 << 20  # 130,000 labels of 250 bytes
MAX_TEXT = 200  # characters of a label
SHOWN_FROM = 0.6  # balanced accuracy; 0.5 is a guess
MOST_VALUES = 4  # tokens or words one pattern may name
# A value is named if so many contexts have it, and by so much more of them than of other tokens or windows.
LEAST_CONTEXTS, LEAST_GAIN, LEAST_LIFT = 2, 0.1, 2.0
CLEARLY = 0.05  # a kind further down is taken if its difference of shares is larger by this

# Kinds of patterns, simplest first, and how a label says them.
KINDS = {
    "is": "{}", "kind": "{}", "after": "what follows {}", "begins": "the beginning of a sequence", "near": "text with {}",
}  # fmt: skip


class Label(Strict):
    """What somebody or something says a latent stands for.

    Args:
        latent: which.
        text: the label; untrusted text of a model: cut, without control characters, to be escaped where it is shown.
        how: "heuristic" (`Pattern`) or "model" (an endpoint).
        model: name of the model that wrote it, and judged it.
        balanced_accuracy, f1: of telling contexts where the latent is active from others by the label alone; None unscored.
        judged: contexts that the score is of.
    """

    latent: Count
    text: Annotated[str, Field(max_length=MAX_TEXT)]
    how: Literal["heuristic", "model"]
    model: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    balanced_accuracy: float | None = None
    f1: float | None = None
    judged: Count = 0


class Labels(Strict):
    """`labels.json`: at most one label of each kind a latent, sorted by latent and kind."""

    format: Literal[1]
    labels: list[Label]


def read_labels(run: Run) -> dict[tuple[int, str], Label]:
    """Return a run's labels by (latent, how); empty if there are none. Raises: FormatError: not what it must be."""
    try:
        found = read_record(Labels, run.path, LABELS, MAX_LABELS_BYTES)
    except FileNotFoundError:
        return {}
    return {(label.latent, label.how): label for label in found.labels}


def save_labels(run: Run, labels: dict[tuple[int, str], Label]) -> None:
    """Commit a run's labels, all of them, in place of those that are there. Raises: DiskFull, StorageFailed."""
    run.write(LABELS, {"format": 1, "labels": [labels[key].model_dump() for key in sorted(labels)]})
    durable.remove_tree(run.path / "tmp")


def shown_labels(run: Run) -> dict[int, str]:
    """Return the label to show of each latent that has one: a model's before a heuristic's, with its score.

    A pattern that hardly tells more than a guess (below SHOWN_FROM, or unscored) is kept in the run, and not shown.
    """
    found = {key: x for key, x in read_labels(run).items() if x.how == "model" or (x.balanced_accuracy or 0.0) >= SHOWN_FROM}
    chosen = {latent: found[latent, how] for how in ("heuristic", "model") for latent, h in found if h == how}
    score = {i: "" if x.balanced_accuracy is None else f" ({x.balanced_accuracy:.2f})" for i, x in chosen.items()}
    return {latent: clean(label.text) + score[latent] for latent, label in sorted(chosen.items())}


def clean(text: str) -> str:
    """Return text of a model or corpus as one line of at most MAX_TEXT characters that can be printed.

    Example:
        >>> clean("names\\x1b[31m of\\n  cities")
        'names [31m of cities'
    """
    kept = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text[: 8 * MAX_TEXT])
    line = " ".join(kept.split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def halves(latent: Latent) -> tuple[list[Context], list[Context]]:
    """Return a latent's contexts to make a label from, and to judge it by, each strongest first.

    They are taken by turns, so both have all strengths; a context to judge by shares no token with one of the others.
    """
    contexts = sorted({c.row: c for c in (*latent.strongest, *latent.sampled)}.values(), key=lambda c: (-c.value, c.row))
    made = contexts[::2]
    return made, [c for c in contexts[1::2] if all(abs(c.row - other.row) > len(c.tokens) for other in made)]


def facts(tokens: Sequence[str], at: int, peak: int, before: int) -> Iterator[tuple[str, str]]:
    """Yield what can be said of one token: (kind, value), kinds as in KINDS without "near".

    Args:
        tokens: a window of a sequence.
        at: the token's index.
        peak: the index of the token that the window was cut around.
        before: tokens a window has before that one, unless the sequence begins later.

    Example:
        >>> list(facts(["The", " Senate"], at=1, peak=1, before=20))[:2]
        [('is', '“Senate”'), ('after', '“the”')]
    """
    token, previous = tokens[at], tokens[at - 1] if at else ""
    word = token.strip()
    yield "is", f"“{word or token}”".replace("\n", "⏎").replace("\t", "⇥")
    if previous.strip():
        yield "after", f"“{previous.strip().lower()}”"
    if peak < before and at < 4:
        yield "begins", ""
    if not word:
        yield "kind", "line breaks" if "\n" in token else "spaces"
    elif not any(c.isalnum() for c in word):
        yield "kind", "punctuation"
    elif any(c.isdigit() for c in word):
        yield "kind", "numbers"
    elif not word.isascii():
        yield "kind", "letters beyond ASCII"
    else:
        if word[0].isupper():
            yield "kind", "capitals" if len(word) > 1 and word.isupper() else "capitalised words"
        if token[0].isalpha() and previous[-1:].isalpha():
            yield "kind", "parts inside a word"
        if len(word) > 4 and word.isalpha():
            yield "kind", f"words in -{word[-3:].lower()}"


def words_of(tokens: Sequence[str]) -> set[tuple[str, str]]:
    """Return the words of four letters and more in a window, as facts of kind "near".

    Example:
        >>> sorted(word for _, word in words_of(["The", " Senate", " in", " Rome", "<|end|>"]))
        ['“rome”', '“senate”']
    """
    text = "".join(token for token in tokens if not token.startswith("<|"))  # special tokens are no text
    words = "".join(c.lower() if c.isalpha() else " " for c in text).split()
    return {("near", f"“{word}”") for word in words if len(word) > 3}


def background(windows: Sequence[Context], before: int) -> dict[tuple[str, str], float]:
    """Return how common each fact is where no latent in particular is active: shares of all tokens, of "near" of all windows.

    Args:
        windows: drawn from the whole store, once for all latents.
        before: tokens of a window before its peak, unless the sequence begins later.
    """
    tokens = Counter(fact for w in windows for at in range(len(w.tokens)) for fact in facts(w.tokens, at, w.peak, before))
    near = Counter(fact for w in windows for fact in words_of(w.tokens))
    n = max(1, sum(len(w.tokens) for w in windows))
    return {f: c / n for f, c in tokens.items()} | {f: c / max(1, len(windows)) for f, c in near.items()}


def heuristic_label(latent: Latent, common: dict[tuple[str, str], float], before: int) -> Label | None:
    """Return the simplest pattern that tells a latent's peaks from other tokens; None for a latent without contexts.

    Of each kind up to MOST_VALUES values are taken, each as long as it adds more of the latent's contexts than of other
    tokens; the kind of the largest difference of shares (Youden's J, 1950) on half of the contexts is the label, and its
    balanced accuracy, (J + 1) / 2, and F1 at equal numbers are of the other half.

    Args:
        latent: with its contexts.
        common: `background` of the same store.
        before: tokens of a context before its peak.
    """
    chosen, rest = ([set(facts(c.tokens, c.peak, c.peak, before)) | words_of(c.tokens) for c in half] for half in halves(latent))
    if not chosen:
        return None
    best: tuple[float, str, list[tuple[str, str]]] = (0.0, "", [])
    for kind in KINDS:
        values: list[tuple[str, str]] = []
        left, j = chosen, 0.0
        while left and len(values) < MOST_VALUES:
            counts = Counter(fact for has in left for fact in has if fact[0] == kind)
            shares = {f: (n / len(chosen), common.get(f, 0.0)) for f, n in counts.items() if n >= LEAST_CONTEXTS}
            gain = {f: here - there for f, (here, there) in shares.items() if here >= LEAST_LIFT * there}
            if not gain or max(gain.values()) < LEAST_GAIN:
                break
            value = min(gain, key=lambda fact: (-gain[fact], fact))
            values.append(value)
            j += gain[value]
            left = [has for has in left if value not in has]
        if j > best[0] + CLEARLY:
            best = (j, kind, values)
    _, kind, values = best
    text = KINDS[kind].format(" | ".join(value for _, value in values)) if values else "no simple pattern"
    label = Label(latent=latent.index, text=clean(text), how="heuristic")
    if not rest:
        return label
    hit = sum(any(v in has for v in values) for has in rest) / len(rest)
    wrong = min(1.0, sum(common.get(v, 0.0) for v in values))
    scores = {"balanced_accuracy": (hit - wrong + 1) / 2, "f1": 2 * hit / (1 + hit + wrong), "judged": len(rest)}
    return label.model_copy(update=scores)
