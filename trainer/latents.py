"""One latent, as people and programs look at it: its contexts with their texts, its numbers, its relations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from actstore.reader import Store


@dataclass(frozen=True, slots=True)
class Context:
    """One place where a latent is active, with the text around it.

    Args:
        value: the latent's activation there.
        quantile: share of the latent's activations that are smaller, 0 to 1, estimated from the sample; 1.0 for the strongest.
        row: row of the store.
        document: document index.
        tokens: texts of the tokens around it, within its own sequence.
        activations: the latent's activation on each of these; 0 where it is not active, or the row is left out.
        peak: index in `tokens` of the token the context is about.
    """

    value: float
    quantile: float
    row: int
    document: int
    tokens: list[str]
    activations: list[float]
    peak: int

    @property
    def text(self) -> str:
        """The tokens joined."""
        return "".join(self.tokens)


@dataclass(frozen=True, slots=True)
class Latent:
    """All that is known of one latent.

    Args:
        index: which latent.
        rows: rows counted on which it is active; `density` their share of all rows counted.
        maximum: its largest activation; 0 for one that was never active. `mean` is over the rows on which it is active.
        documents: documents in which it is active.
        edges, counts: histogram of its activations, edges (bins + 1) and counts (bins).
        strongest: contexts of its largest activations, largest first, at most one a document.
        sampled: contexts drawn uniformly from all of its activations, largest first.
        neighbours: (latent, cosine of the decoder rows), nearest first.
        coactive: (latent, Jaccard index of being active on the same rows), largest first.
        promoted, suppressed: (token text, change of its logit by an activation of 1), strongest first; empty without a model.
        subsets: name of a corpus subset to the share of this latent's rows that lie in it, largest first; empty if not known.
    """

    index: int
    rows: int
    density: float
    maximum: float
    mean: float
    documents: int
    edges: list[float]
    counts: list[int]
    strongest: list[Context]
    sampled: list[Context]
    neighbours: list[tuple[int, float]]
    coactive: list[tuple[int, float]]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    subsets: dict[str, float]

    def by_quantile(self, bins: int, each: int) -> list[list[Context]]:
        """Return sampled contexts of equally filled bins of the latent's own activations, strongest bin first.

        Args:
            bins: how many.
            each: contexts of a bin, at most.
        """
        cuts = [round(i * len(self.sampled) / bins) for i in range(bins + 1)]
        return [self.sampled[low:high][:each] for low, high in pairwise(cuts)]


def rows_around(store: Store, row: int, before: int, after: int) -> tuple[int, int]:
    """Return the rows around a row that belong to its own sequence: the first, and the one behind the last."""
    first = max(0, row - before)
    positions, at = store.read("positions", first, row + after + 1), row - first
    same = positions - positions[at] == np.arange(len(positions)) - at
    return first + int(np.argmax(same)), first + len(same) - int(np.argmax(same[::-1]))


def context_at(store: Store, row: int, before: int, strip: list[float], value: float = 0.0, quantile: float = 0.0) -> Context:
    """Return the context of a row, as far as its sequence goes.

    Args:
        store: has the texts.
        row: row of the store.
        before: entries of the strip before this row.
        strip: activations of a latent on the rows around.
        value, quantile: see Context.
    """
    first, last = rows_around(store, row, before, len(strip) - before - 1)
    tokens = [store.vocabulary.text(t) for t in store.read("tokens", first, last).tolist()]
    document = int(store.read("documents", row, row + 1)[0])
    return Context(value, quantile, row, document, tokens, strip[before + first - row : before + last - row], row - first)
