"""What latents fire on: their strongest rows, and the tokens around them, from one pass over a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actstore.reader import Store
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources, as_sources

ROWS_AT_ONCE = 2048
OUTLIER_NORM = 10.0  # rows longer than this many medians are left out: on them every latent is strongest
CONTEXT_BEFORE, CONTEXT_AFTER = 20, 8  # tokens shown around the strongest one


@dataclass(frozen=True, slots=True)
class Context:
    """One place where a latent is active.

    Args:
        value: the latent's activation there.
        row: row of the store.
        document: document index.
        before, token, after: the text; `token` is where it is active.
    """

    value: float
    row: int
    document: int
    before: str
    token: str
    after: str


@dataclass(frozen=True, slots=True)
class Latent:
    """One latent and its strongest contexts.

    Args:
        index: which latent.
        density: share of the rows looked at on which it is active.
        max_activation: its largest value.
        contexts: strongest first, at most one a document.
    """

    index: int
    density: float
    max_activation: float
    contexts: list[Context]


def strongest_latents(
    sae: SparseAutoencoder, stores: Store | Sources, *, rows: int, n_latents: int, n_contexts: int, skip_positions: int = 1,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[Latent]:  # fmt: skip
    """Return the latents of largest activation, each with its strongest contexts.

    Args:
        sae: in the units of the stores.
        stores: the stores.
        rows: look at the first rows of the store, at most this many.
        n_latents: latents to return.
        n_contexts: contexts of each.
        skip_positions: leave out the first positions of a sequence, where massive activations drown all else.
        on_rows: called with the rows just looked at.
    """
    sources = as_sources(stores)
    store, rows = sources.first, min(rows, sources.rows)
    candidates = 4 * n_contexts  # several strong rows lie in one document, of which one is shown
    values, places, counts = _strongest_rows(sae, sources, rows, candidates, skip_positions, on_rows)
    order = torch.argsort(values[0], descending=True)[:n_latents]
    latents = []
    for index in order.tolist():
        if float(values[0, index]) <= 0:
            continue
        contexts: list[Context] = []
        seen: set[int] = set()
        for value, row in zip(values[:, index].tolist(), places[:, index].tolist(), strict=True):
            document = int(store.read("documents", row, row + 1)[0])
            if value > 0 and document not in seen and len(contexts) < n_contexts:
                seen.add(document)
                contexts.append(context_of(store, row, value))
        latents.append(Latent(index, float(counts[index]) / max(rows, 1), float(values[0, index]), contexts))
    return latents


@torch.no_grad()
def _strongest_rows(
    sae: SparseAutoencoder, sources: Sources, rows: int, n: int, skip_positions: int, on_rows: Callable[[int], None]
) -> tuple[Float[Tensor, "n latents"], Int[Tensor, "n latents"], Int[Tensor, " latents"]]:
    """Return the n largest activations of each latent, the rows they lie in, and on how many rows it is active."""
    width = sae.config.n_latents
    values, places = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.int64)
    counts = torch.zeros(width, dtype=torch.int64)
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(rows, start + ROWS_AT_ONCE)
        x = sources.take(np.arange(start, stop)).x
        codes = sae.encode(x)
        counts += (codes != 0).sum(0)
        norms = x.norm(dim=1)
        codes[norms > OUTLIER_NORM * norms.median()] = 0
        codes[torch.from_numpy(sources.first.read("positions", start, stop) < skip_positions)] = 0
        best, at = codes.topk(min(n, len(codes)), dim=0)
        joined, order = torch.cat([values, best]).topk(n, dim=0)
        places = torch.cat([places, at + start]).gather(0, order)
        values = joined
        on_rows(stop - start)
    return values, places, counts


def context_of(store: Store, row: int, value: float) -> Context:
    """Return the text around a row, within its own sequence."""
    first, last = window_of(store, row)
    texts = [store.vocabulary.text(t) for t in store.read("tokens", first, last).tolist()]
    at = row - first
    return Context(
        value, row, int(store.read("documents", row, row + 1)[0]), "".join(texts[:at]), texts[at], "".join(texts[at + 1 :])
    )


def window_of(store: Store, row: int) -> tuple[int, int]:
    """Return the rows around a row that belong to its own sequence: the first, and the one behind the last."""
    position = int(store.read("positions", row, row + 1)[0])
    last = min(store.rows, row + 1 + CONTEXT_AFTER)
    following = store.read("positions", row + 1, last)
    last = row + 1 + int(np.argmin(following > position)) if (following <= position).any() else last
    return row - min(position, CONTEXT_BEFORE), last
