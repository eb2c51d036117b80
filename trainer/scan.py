"""The features of runs, from one pass over the rows of their store that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.corpus import find_files, identify_files
from actstore.errors import StoreNotFound, UsageError
from actstore.content import field_of
from actstore.limits import MAX_ROWS
from actstore.records import file_records
from trainer import kernels
from trainer.checkpoint import Run, load_sae
from trainer.effects import logit_effects, open_model
from trainer.features import (
    AFTER, BEFORE, BINS, EFFECTS, NEAREST, OUTLIER_NORM, SAMPLED, STRONGEST, Features, FeaturesRecord, load_features, save_features,
    shapes_of,
)  # fmt: skip
from trainer.geometry import nearest
from trainer.kernels.compiled import by_latent, use_torch_threads
from trainer.kernels.tally import COUNTED, LEFT_OUT, SHOWN, Rows, Tallies, coactivity, hashed, tally
from trainer.memory import chosen_device
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources

ROWS = 300_000  # rows looked at unless told otherwise: half a minute for 8,192 latents on two cores
ROWS_AT_ONCE = 4096  # the rows of contexts that reach over its ends are encoded twice: under 1 %
PAIRS = 1 << 23  # of a run, kept to see which latents are active together: 32 MiB
LEAST_TOGETHER = 3  # rows that two latents share by chance too easily

Subsets = tuple[list[str], npt.NDArray[np.int32]]  # names, and the subset of each document; -1 for none


def features_of(
    runs: list[Run], open_sources: Callable[[Run], Sources], *, rows: int | None = None, skip_positions: int = 1,
    model: str | None = None, corpus: tuple[Path, ...] = (), subset_field: str = "meta.pile_set_name", device: str = "auto",
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Features]:  # fmt: skip
    """Return the features of finished runs, in their order; computes those that a run does not have yet.

    Runs of the same stores share one pass over the rows. What is computed is committed into the run, so asking again is
    free. Memory: the rows of a batch and, a run, 10 kB a latent and 64 MiB; it does not grow with the rows.

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
    found: dict[str, Features] = {}
    passes: dict[tuple[str, ...], tuple[Sources, list[Run]]] = {}
    for run in dict.fromkeys(r.digest for r in runs):
        pass
    for run in {r.digest: r for r in runs}.values():
        if run.result is None:
            raise StoreNotFound("the run is not finished", run.digest[:12], "run its `trainer fit` again: it goes on where it stopped")
        kept = load_features(run)
        if kept is not None and _serves(kept.record, rows, skip_positions, subset_field if corpus else None):
            found[run.digest] = kept
        else:
            sources = open_sources(run)
            passes.setdefault(tuple(s.digest for s in sources.stores), (sources, []))[1].append(run)
    opened = {r.digest: open_model(model, r.key) for r in runs} if model else {}
    subsets = {k: _subsets(corpus, subset_field, s.first.key.model_dump()) if corpus else None for k, (s, _) in passes.items()}
    looked = {k: min(rows or ROWS, s.rows) for k, (s, _) in passes.items()}
    done = 0
    for key, (sources, some) in passes.items():
        pass_ = _Pass(sources, looked[key], skip_positions, subsets[key], chosen_device(device))
        for features in pass_.run(some, lambda n, before=done: on_rows(before + n, sum(looked.values()))):
            record = features.record.model_copy(update={"subset_field": subset_field if corpus else None})
            found[features.run.digest] = save_features(features.run, record, features.arrays)
        done += looked[key]
    return [_with_effects(found[r.digest], opened.get(r.digest)) for r in runs]
