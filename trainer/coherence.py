"""Coherence: how many words the texts share on which a latent is strongest.

The reference study's form ("token overlap") looks at the 5 strongest rows, which may all lie in one document, and compares
labels of documents. The form for comparisons takes the strongest row of each of the 5 strongest *documents*; a latent that
is active in fewer than two has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actstore.reader import Store
from trainer.features import window_of
from trainer.sae import SparseAutoencoder
from trainer.sources import as_sources

OPENING_CHARACTERS = 60  # of a document, in its label: the reference study's
_OPENING_ROWS = 256  # looked at for them


def overlap(texts: Sequence[str]) -> float | None:
    """Return the mean pairwise Jaccard index of the lower-cased words of texts; None for fewer than two texts.

    Source: github.com/ashlrai/mechanistic-interpretability, src/mech_interp/sae/analysis.py, `_token_overlap_coherence`.

    Example:
        >>> overlap(["The cat sat", "the cat ran", "a dog"]), overlap(["alone"])
        (0.16666666666666666, None)
    """
    words = [set(text.lower().split()) for text in texts]
    pairs = [len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(words, 2)]
    return fmean(pairs) if pairs else None


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
        return self.rows[self.values[:, latent] > 0, latent].tolist()


@torch.no_grad()
def strongest_documents(sae: SparseAutoencoder, store: Store, rows: npt.NDArray[np.int64], n_documents: int = 5) -> Strongest:
    """Find for every latent the documents it is strongest in; memory is that of the longest document's codes.

    Args:
        sae: in the units of the store, on the CPU.
        store: the store.
        rows: (n,) int64 sorted row numbers.
        n_documents: how many documents.
    """
    n, sources = sae.config.n_latents, as_sources(store)
    values, places = torch.zeros(n_documents, n), torch.zeros(n_documents, n, dtype=torch.int64)
    counts = torch.zeros(n, dtype=torch.int64)
    ends = np.flatnonzero(np.diff(store.take("documents", rows))) + 1
    for mine in np.split(rows, ends):
        codes = sae.encode(sources.take(mine).x).abs()
        counts += (codes != 0).sum(0)
        best, at = codes.max(0)
        values, order = torch.cat([values, best[None]]).topk(n_documents, dim=0)
        places = torch.cat([places, torch.from_numpy(mine)[at][None]]).gather(0, order)
    return Strongest(values, places, counts)


def text_rows(store: Store, first: int = 0) -> npt.NDArray[np.int64]:
    """Return the rows from `first` on that are text: no special token, no padding, not first in their sequence."""
    special = np.array(store.vocabulary.special, np.int32)
    plain = (store.read("positions", first, store.rows) > 0) & ~np.isin(store.read("tokens", first, store.rows), special)
    return first + np.flatnonzero(plain)


def openings(store: Store) -> dict[int, str]:
    """Return the first 60 characters of each document, by document index, from the store's own tokens.

    A character that several tokens make up together shows as U+FFFD, since the store keeps the text of each token.
    """
    found, documents = {}, store.read("documents", 0, store.rows)
    special = set(store.vocabulary.special)
    for index, start in zip(*np.unique(documents, return_index=True), strict=True):
        tokens = store.read("tokens", start, min(start + _OPENING_ROWS, int(np.searchsorted(documents, index, "right"))))
        text = "".join(store.vocabulary.text(t) for t in tokens.tolist() if t not in special)
        found[int(index)] = text.strip()[:OPENING_CHARACTERS]
    return found


def of_openings(strongest: Strongest, store: Store, labels: dict[int, str]) -> list[float | None]:
    """Return each latent's overlap of the openings of its strongest documents: the study's, on distinct documents."""
    rows = np.unique(strongest.rows.numpy())
    document = dict(zip(rows.tolist(), store.take("documents", rows).tolist(), strict=True))
    return [overlap([labels[document[row]] for row in strongest.rows_of(i)]) for i in range(len(strongest.counts))]


def context(store: Store, row: int, marks: str = "") -> str:
    """Return the text around a row of its own sequence, up to 20 tokens before and 8 after, without special tokens.

    Args:
        store: the store.
        row: of the store.
        marks: two characters put around the row's own token; none for nothing.
    """
    first, last = window_of(store, row)
    tokens, special = store.read("tokens", first, last).tolist(), set(store.vocabulary.special)
    texts = ["" if token in special else store.vocabulary.text(token) for token in tokens]
    texts[row - first] = marks[:1] + texts[row - first] + marks[1:]
    return "".join(texts)


def of_contexts(strongest: Strongest, store: Store) -> list[float | None]:
    """Return each latent's overlap of the contexts of its strongest row of each document."""
    return [overlap([context(store, row) for row in strongest.rows_of(i)]) for i in range(len(strongest.counts))]
