"""The features of runs, from one pass over the rows of their store that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint import Run
from trainer.features import Features
from trainer.sources import Sources

ROWS = 300_000  # rows looked at unless told otherwise: half a minute for 8,192 latents on two cores


def features_of(
    runs: list[Run], open_sources: Callable[[Run], Sources], *, rows: int | None = None, skip_positions: int = 1,
    model: str | None = None, corpus: tuple[Path, ...] = (), subset_field: str = "meta.pile_set_name", device: str = "auto",
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Features]:  # fmt: skip
    """Return the features of finished runs, in their order; computes those that a run does not have yet.

    Runs of the same stores share one pass over the rows. What is computed is committed into the run, so asking again is
    free. Memory: the rows of a batch and, a run, 10 kB a latent and 32 MiB; it does not grow with the rows.

    Args:
        runs: finished runs.
        open_sources: opens a run's stores.
        rows: look at the first rows, at most this many; None for what the run already has, else ROWS.
        skip_positions: leave out the first positions of a sequence, where massive activations drown all else; rows of a
            norm over 10 medians are left out always. Left out means: neither counted nor shown.
        model: folder or hub id of the model the store is of, for logit effects; None leaves these out.
        corpus: files of the store's corpus, to look up which subset a document is of; empty leaves these out.
        subset_field: the field of a record that names its subset; a dotted path reaches into nested objects.
        device: "auto", "cpu", "cuda" or "mps".
        on_rows: called with the rows done so far and the rows of all passes together.

    Raises: StoreNotFound: an unfinished run, or a store that is not here. UsageError: not the store's model or corpus.
    """
    raise NotImplementedError
