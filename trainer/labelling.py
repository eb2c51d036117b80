"""Label the latents of a run: heuristics for all at once, a model's labels a few at a time, committed as they come."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from actstore.errors import ActstoreError, FormatError, StorageFailed
from trainer.checkpoint import Run, load_sae
from trainer.features import AFTER, BEFORE, Features
from trainer.judge import Endpoint, ask, detect, explain
from trainer.labels import Label, background, halves, heuristic_label, read_labels, save_labels
from trainer.latents import Context, Latent, context_at
from trainer.sources import Sources

WINDOWS, WINDOWS_AT_ONCE = 512, 64  # drawn from the whole store, to compare a latent's contexts with; encoded together
EXPLAINED = 20  # contexts a label is written from, at most
JUDGED = 10  # contexts of each kind in a detection, at most
TOGETHER = 8  # labels of a commit: a crash loses fewer than that
Windows = list[tuple[Context, frozenset[int]]]  # with the latents active in each
OnLabel = Callable[[int, Label | None, str], None]


@torch.no_grad()
def draw_windows(features: Features, sources: Sources) -> Windows:
    """Return windows around rows drawn uniformly from those of the features, each with the latents active in it."""
    sae, length = load_sae(features.run.path), BEFORE + 1 + AFTER
    cells = np.random.default_rng(0).choice(max(1, features.record.rows // length), WINDOWS, replace=True)
    peaks = np.unique(cells) * length + BEFORE  # no two windows overlap
    windows = [context_at(sources.first, row, BEFORE, [0.0] * length) for row in peaks[peaks < sources.rows].tolist()]
    found: Windows = []
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        some = windows[start : start + WINDOWS_AT_ONCE]
        rows = [np.arange(len(c.tokens)) + c.row - c.peak for c in some]
        code = sae.encode_sparse(sources.take(np.concatenate(rows)).x)
        window = np.repeat(np.arange(len(some)), list(map(len, rows)))[code.rows().numpy()]
        indices, active = code.indices.numpy(), (code.values != 0).numpy()
        found += [(c, frozenset(indices[active & (window == i)].tolist())) for i, c in enumerate(some)]
    return found


def label_by_pattern(
    features: Features, sources: Sources, latents: Sequence[int], on_label: OnLabel = lambda latent, label, problem: None
) -> list[Label]:
    """Label latents by what their contexts share (`labels.heuristic_label`), and commit the labels into the run together.

    Args:
        features: of the run.
        sources: its stores.
        latents: which.
        on_label: called with each latent, its label, and why it has none.

    Returns: the labels, in the order of the latents; one without contexts has none.
    Raises: UsageError: no such latent. StoreLocked: somebody else labels the run.
    """
    with _labels_of(features.run) as labels:
        common = background([context for context, _ in draw_windows(features, sources)], BEFORE)
        made = []
        for i in latents:
            label = heuristic_label(features.latent(i, sources.first), common, BEFORE)
            on_label(i, label, "" if label else "it is never active")
            made += [label] if label else []
        labels |= {(label.latent, label.how): label for label in made}
    return made


def label_by_model(
    features: Features, sources: Sources, latents: Sequence[int], endpoint: Endpoint, *, scored: bool = False,
    parallel: int = 4, on_label: OnLabel = lambda latent, label, problem: None,
) -> list[Label]:  # fmt: skip
    """Have a model label latents that it has not labelled yet; what is done is committed every few labels, and at an end.

    Args:
        features: of the run.
        sources: its stores.
        latents: which.
        endpoint: the model.
        scored: have the labels judged by detection as well; one that is there already is only judged.
        parallel: latents asked about at the same time.
        on_label: called with each latent, its label, and why it has none.

    Returns: the labels that are there in the end, in the order of the latents.
    Raises: UsageError, StorageFailed: the endpoint refuses, or gives no answer; labels made before are committed.
        StoreLocked: somebody else labels the run.
    """
    known = read_labels(features.run)
    mine = {i: label for (i, how), label in known.items() if how == "model" and label.model == endpoint.model}
    todo = [i for i in dict.fromkeys(latents) if i not in mine or (scored and not mine[i].judged)]
    windows = draw_windows(features, sources) if todo else []
    for start in range(0, len(todo), TOGETHER):
        some = [features.latent(i, sources.first) for i in todo[start : start + TOGETHER]]
        job = partial(_ask_about, endpoint, mine, windows, scored)
        with _labels_of(features.run) as labels, contextlib.closing(_answers(some, job, parallel)) as answers:
            for i, answer in answers:
                if isinstance(answer, Label):
                    labels[i, "model"] = mine[i] = answer
                    on_label(i, answer, "")
                elif isinstance(answer, FormatError):
                    on_label(i, None, answer.what)
                else:
                    raise answer
    return [mine[i] for i in latents if i in mine]


@contextlib.contextmanager
def _labels_of(run: Run) -> Iterator[dict[tuple[int, str], Label]]:
    """Yield a run's labels to be changed, and commit them however the block ends: Ctrl-C keeps what is done."""
    with run.lock("a labelling"):
        labels = read_labels(run)
        before = dict(labels)
        try:
            yield labels
        finally:
            if labels != before:
                save_labels(run, labels)


def _ask_about(
    endpoint: Endpoint, mine: dict[int, Label], windows: Windows, scored: bool, latent: Latent, stopped: threading.Event
) -> Label:
    question = partial(ask, endpoint, wait=stopped.wait)
    made, rest = halves(latent)
    if not made:
        raise FormatError("it is never active")
    old = mine.get(latent.index)
    text = old.text if old else explain(question, _spread(made, EXPLAINED))
    label = Label(latent=latent.index, text=text, how="model", model=endpoint.model)
    if not scored:
        return label
    inactive = [context for context, active in windows if latent.index not in active]
    accuracy, f1, judged = detect(question, text, _spread(rest, JUDGED), _spread(inactive, JUDGED), latent.index)
    return label.model_copy(update={"balanced_accuracy": accuracy, "f1": f1, "judged": judged})


def _spread(contexts: Sequence[Context], most: int) -> list[Context]:
    """Return at most that many, of all strengths."""
    n = min(most, len(contexts))
    return [contexts[i * len(contexts) // n] for i in range(n)]


def _answers(
    latents: list[Latent], job: Callable[[Latent, threading.Event], Label], parallel: int
) -> Generator[tuple[int, Label | ActstoreError], None, None]:
    """Yield each latent's label or error as it comes. Daemon threads: Ctrl-C does not wait for a slow server."""
    todo: queue.SimpleQueue[Latent] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Label | ActstoreError]] = queue.SimpleQueue()
    stopped = threading.Event()
    for latent in latents:
        todo.put(latent)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stopped.is_set():
                latent = todo.get_nowait()
                answer: Label | ActstoreError = StorageFailed("a bug in actstore: see above")
                try:
                    answer = job(latent, stopped)
                except ActstoreError as error:
                    answer = error
                finally:
                    done.put((latent.index, answer))

    for _ in range(min(parallel, len(latents))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in latents:
            yield done.get()
    finally:
        stopped.set()
