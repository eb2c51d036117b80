"""The reference study's table of a finished run, number by number, each beside the honest one.

`reference` is measured on the rows that were trained on, BOS and padding among them, by the study's definitions; `honest`
on the text (no BOS, no padding, not first in a sequence) of documents that the study does not see, by the standard ones.

Coherence: how many words the texts share on which a latent is strongest. The study compares labels of the documents of the 5
strongest rows, which may all lie in one; here the strongest row of each of the 5 strongest *documents* is taken, and a latent
active in fewer than two has none.

Source: github.com/ashlrai/mechanistic-interpretability, src/mech_interp/sae/analysis.py (`compute_feature_analysis`) and
the scale report; ../shared/research/ecosystem.md, sections 3.1 and 3.2.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actstore.reader import Store
from trainer.checkpoint import Run, load_sae
from trainer.latents import rows_around
from trainer.metrics import is_plain, measure
from trainer.reference_study import CPU, study_rows, train
from trainer.sae import SparseAutoencoder
from trainer.sources import as_sources

Int64 = npt.NDArray[np.int64]
OPENING_CHARACTERS = 60  # of a document, in its label
_OPENING_ROWS = 256  # looked at for them
TOP_ROWS, TOP_LATENTS = 5, 10
COHERENT = 0.3
CONTEXT_CHARACTERS = 30  # of an honest prompt, on each side of its token


def overlap(texts: Sequence[str]) -> float | None:
    """Return the mean pairwise Jaccard index of the lower-cased words of texts; None for fewer than two texts.

    Source: github.com/ashlrai/mechanistic-interpretability, src/mech_interp/sae/analysis.py, `_token_overlap_coherence`.

    Example:
        >>> overlap(["The cat sat", "the cat ran", "a dog"]), overlap(["alone"])
        (0.16666666666666666, None)
    """
    words = [set(text.lower().split()) for text in texts]
    pairs = [len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(words, 2)]
    return statistics.fmean(pairs) if pairs else None


class Strongest(NamedTuple):
    """The strongest row of each of the strongest documents of every latent, strongest first.

    Args:
        values: (n_documents, n_latents) largest |activation| in the document; 0 where there is none.
        rows: (n_documents, n_latents) int64, where in the store.
        counts: (n_latents,) int64, rows on which the latent is active.
    """

    values: Float[Tensor, "n_documents n_latents"]
    rows: Int[Tensor, "n_documents n_latents"]
    counts: Int[Tensor, " n_latents"]

    def rows_of(self, latent: int) -> list[int]:
        """Return the rows of one latent, one a document."""
        found: list[int] = self.rows[self.values[:, latent] > 0, latent].tolist()
        return found


@torch.no_grad()
def strongest_documents(sae: SparseAutoencoder, store: Store, rows: Int64, n_documents: int = 5) -> Strongest:
    """Find for every latent the documents it is strongest in; memory is that of the longest document's codes.

    Args:
        sae: in the units of the store, on the CPU.
        store: the store.
        rows: (n,) int64 sorted row numbers, n >= 1.
        n_documents: how many documents.
    """
    n, sources = sae.config.n_latents, as_sources(store)
    values, places = torch.zeros(n_documents, n), torch.zeros(n_documents, n, dtype=torch.int64)
    counts = torch.zeros(n, dtype=torch.int64)
    for mine in np.split(rows, np.flatnonzero(np.diff(store.take("documents", rows))) + 1):
        codes = sae.encode(sources.take(mine).x).abs()
        counts += (codes != 0).sum(0)
        best, at = codes.max(0)
        values, order = torch.cat([values, best[None]]).topk(n_documents, dim=0)
        places = torch.cat([places, torch.from_numpy(mine)[at][None]]).gather(0, order)
    return Strongest(values, places, counts)


def text_rows(store: Store, first: int = 0) -> Int64:
    """Return the rows from `first` on that are text: no special token, no padding, not first in their sequence."""
    return first + np.flatnonzero(is_plain(store, np.arange(first, store.rows)))


def openings(store: Store) -> tuple[list[str], Int64]:
    """Return the first 60 characters of each document, from the store's own tokens, and (rows,) which one each row is of.

    A character that several tokens make up together shows as U+FFFD, since the store keeps the text of each token.
    """
    _, starts, owners = np.unique(store.read("documents", 0, store.rows), return_index=True, return_inverse=True)
    texts, special = [], set(store.vocabulary.special)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), store.rows], strict=True):
        tokens = store.read("tokens", start, min(start + _OPENING_ROWS, stop)).tolist()
        texts.append("".join(store.vocabulary.text(t) for t in tokens if t not in special).strip()[:OPENING_CHARACTERS])
    return texts, owners


class Latent(NamedTuple):
    """One latent of a table: rows it is active on, its largest |activation|, its coherence, and text of its strongest row."""

    active: int
    max_activation: float
    coherence: float | None
    prompt: str


def study_latents(codes: Float[Tensor, "rows n_latents"], labels: list[str]) -> list[Latent]:
    """Return every latent by the study's definitions: a single label is coherent, a dead latent is not.

    Args:
        codes: of the rows that were trained on.
        labels: of each row's document.
    """
    strength, latents = codes.abs(), []
    for i, active in enumerate((codes != 0).sum(0).tolist()):
        # One top-k a latent, of as many rows as it is active on: which of equal rows come first depends on both.
        best = strength[:, i].topk(min(TOP_ROWS, active)).indices.tolist()
        prompts = list(dict.fromkeys(labels[row] for row in best))
        coherence = 1.0 if len(prompts) == 1 else overlap(prompts) or 0.0
        latents.append(Latent(active, strength[:, i].max().item(), coherence, prompts[0] if prompts else ""))
    return latents


def unseen_latents(strongest: Strongest, store: Store, texts: list[str], owners: Int64) -> list[Latent]:
    """Return every latent by its strongest documents: `texts` are their openings, `owners` says which one a row is of."""
    latents = []
    for i, active in enumerate(strongest.counts.tolist()):
        rows = strongest.rows_of(i)
        prompt = _around(store, rows[0]) if rows else ""
        coherence = overlap([texts[owners[row]] for row in rows])
        latents.append(Latent(active, strongest.values[0, i].item(), coherence, prompt))
    return latents


def _around(store: Store, row: int) -> str:
    """Return the text around a row, its token in «»."""
    first, last = rows_around(store, row, CONTEXT_CHARACTERS, CONTEXT_CHARACTERS)
    texts, at = [store.vocabulary.text(t) for t in store.read("tokens", first, last).tolist()], row - first
    return f"{''.join(texts[:at])[-CONTEXT_CHARACTERS:]}«{texts[at]}»{''.join(texts[at + 1 :])[:CONTEXT_CHARACTERS]}"


@torch.no_grad()
def study_table(run: Run, store: Store) -> dict[str, Any]:
    """Return the table of a finished run of `fit_study`, as JSON values.

    Returns: `reference` and `honest` (None where the store has no further documents), numbers by name; `latents`, the ten of
        largest |activation|, each with `latent` and under `reference` and `honest` the fields of Latent.
    Raises: StoreDamaged, StorageFailed.
    """
    sae, n, (texts, owners), losses = load_sae(run.path), study_rows(store), openings(store), run.finished()["train"]
    x = as_sources(store).take(np.arange(n)).x
    codes = sae.encode(x)
    latents = study_latents(codes, [f"doc_{owner}: {texts[owner]}" for owner in owners[:n].tolist()])
    mse = torch.mean((x - sae.decode(codes)) ** 2).item()
    reference = {
        **_numbers(owners[:n], losses["initial_loss"], losses["final_loss"], latents), "reconstruction_mse": mse,
        "explained_variance": 1 - mse / torch.var(x, unbiased=False).item(),
        "mean_latents_per_row": (codes != 0).sum(1).float().mean().item(), "weight_bytes": 2 * sae.W_enc.nbytes,
        "losses_per_epoch": [losses[name] for name in sorted(losses, key=len) if name.startswith("loss_epoch")],
    }  # fmt: skip
    held, unseen, honest = text_rows(store, n), None, None
    if len(held):
        unseen = unseen_latents(strongest_documents(sae, store, held), store, texts, owners)
        begun, _ = train(x, replace(run.config, rows=1))
        before, after = (measure(one, store, held, CPU).all_rows.numbers() for one in (begun, sae))
        first, last = before["mse_per_element"], after["mse_per_element"]
        honest = {
            **_numbers(owners[held], first, last, unseen), "reconstruction_mse": last,
            "explained_variance": after["explained_variance"], "mean_latents_per_row": after["l0"],
        }  # fmt: skip
    top = sorted((i for i in range(len(latents)) if latents[i].active), key=lambda i: -latents[i].max_activation)[:TOP_LATENTS]
    shown = [
        {"latent": i, "reference": latents[i]._asdict(), "honest": unseen[i]._asdict() if unseen and unseen[i].active else None}
        for i in top
    ]
    return {"reference": reference, "honest": honest, "latents": shown}


def _numbers(owners: Int64, first: float, last: float, latents: list[Latent]) -> dict[str, Any]:
    """Return what both sides have, of measured rows of these documents and errors at first and at last."""
    live = sum(latent.active > 0 for latent in latents)
    values = [latent.coherence for latent in latents if latent.active and latent.coherence is not None]
    return {
        "rows": len(owners), "documents": len(np.unique(owners)), "initial_mse": first, "final_mse": last,
        "reduction": 1 - last / first, "live": live, "dead": len(latents) - live, "dead_window_rows": len(owners),
        "median_coherence": statistics.median(values) if values else None, "coherence_is_1": sum(v == 1.0 for v in values),
        "coherence_over_0.3": sum(v > COHERENT for v in values),
    }  # fmt: skip
