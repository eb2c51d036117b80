"""Measure a finished run on held-out rows of its stores, or on the rows of others."""

from __future__ import annotations

from typing import Any

import numpy as np

from actstore.errors import UsageError
from actstore.reader import Store
from trainer.batches import split_rows
from trainer.checkpoint import Run, load_sae
from trainer.memory import chosen_device
from trainer.metrics import measure
from trainer.sources import Sources, as_sources


def evaluate(run: Run, stores: Store | Sources, rows: int | None = None, device: str = "auto") -> dict[str, Any]:
    """Return a finished run's metrics.

    Args:
        run: the run.
        stores: its own stores (the held-out rows are measured) or others (all their rows are).
        rows: measure at most this many rows, the first ones; None for all.
        device: "auto", "cpu", "cuda" or "mps".

    Returns: the numbers of `metrics.Measured.numbers`, with `dead_fraction` of the training and its window.
    Raises: UsageError: the stores' rows have other widths, or there are no rows to measure.
    """
    sources = as_sources(stores)
    if sources.widths != run.widths:
        raise UsageError(
            f"the store's rows have width {sources.widths}, the SAE was trained on width {run.widths}",
            f"store {sources.first.digest[:12]}, run {run.digest[:12]}",
            "name a store of the same model and hook point width",
        )
    own = sources.first.content_digest == run.content_digest
    chosen = split_rows(sources.first, run.config).held_out if own else np.arange(sources.rows)
    chosen = chosen[:rows]
    if not len(chosen):
        raise UsageError(
            "the run held out no rows", f"run {run.digest[:12]}", "name rows to measure with --store, or fit with --holdout"
        )
    where = chosen_device(device)
    sae = load_sae(run.path).to(where)
    result = run.result or {}
    return {
        **measure(sae, sources, chosen, where).numbers(),
        "run": run.digest,
        "store": sources.first.digest,
        "held_out": own,
        "dead_fraction": result.get("dead_fraction"),
        "dead_window_rows": result.get("dead_window_rows"),
    }
