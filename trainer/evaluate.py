"""Measure a finished run on held-out rows of its stores, or on the rows of others; what was found is kept in the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import UsageError
from actstore.limits import MAX_CONFIG_BYTES
from actstore.reader import Store
from trainer.batches import split_rows
from trainer.checkpoint import Run, content_of, load_sae
from trainer.geometry import cosine_histogram, max_cosines
from trainer.memory import chosen_device
from trainer.metrics import measure
from trainer.saved import Evaluation, read_record
from trainer.sources import Sources, as_sources
from trainer.splice import Rows, model_loss, open_model

FOLDER = "evaluations"
OnRows = Callable[[str, int, int], None]


def evaluate(
    run: Run, stores: Store | Sources, rows: int | None = None, device: str = "auto", *, with_model: bool = False,
    model: Path | None = None, on_rows: OnRows = lambda stage, n, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Return a finished run's metrics, measured now or, of the same SAE and rows, before.

    Args:
        run: the run.
        stores: its own stores (all rows of held-out documents are measured, also those that a fit with `skip_positions`
            or `exclude_special` leaves out) or others (all their rows are).
        rows: measure at most this many rows, the first ones; None for all.
        device: "auto", "cpu", "cuda" or "mps".
        with_model: run the store's model too, with the SAE spliced in.
        model: folder of that model; None where the store's key or provenance names it.
        on_rows: called with "rows" or "model", the rows just done, and the rows in all.

    Returns: the numbers of `metrics` and, if they were asked for once, `splice`, under their names; `max_cosine`, see
        `geometry`; `dead_fraction`, latents that were active on none of the last `dead_window_rows` rows of training.
    Raises: UsageError: the stores' rows have other widths, or there are no rows to measure; as `open_model` and
        `model_loss`. StoreNotFound: the run is unfinished.
    """
    sources = as_sources(stores)
    if sources.widths != run.widths:
        raise UsageError(
            f"the store's rows have width {sources.widths}, the SAE was trained on width {run.widths}",
            f"store {sources.first.digest[:12]}, run {run.digest[:12]}",
            "name a store of the same model and hook point width",
        )
    own = sources.first.content_digest == run.content_digest
    everything = replace(run.config, skip_positions=0, exclude_special=False)
    chosen: Rows = split_rows(sources.first, everything).held_out if own else range(sources.rows)
    chosen = chosen[:rows]
    if not len(chosen):
        raise UsageError(
            "the run held out no rows", f"run {run.digest[:12]}", "name rows to measure with --store, or fit with --holdout"
        )
    where = chosen_device(device)
    backend = open_model(sources.first, model, str(where), (sources.targets or sources.inputs)[0]) if with_model else None
    found = _kept(run, _name(content_of(sources), own, len(chosen)))
    if found is None or (backend is not None and found.model_loss is None):
        sae, total = load_sae(run.path).to(where), len(chosen)
        if found is None:
            numbers = measure(sae, sources, chosen, where, lambda n: on_rows("rows", n, total)).numbers()
            assert run.result is not None
            found = Evaluation(
                format=1, store=sources.first.digest, content_digest=content_of(sources), held_out=own,
                rows_measured=len(chosen), sae_sha256=run.result["sae_sha256"], numbers=numbers,
                max_cosine=cosine_histogram(max_cosines(sae.W_dec)[0]), model_loss=None,
            )  # fmt: skip
            _keep(run, found)
        if backend is not None:
            losses = model_loss(backend, sae, sources, chosen, lambda n: on_rows("model", n, total))
            found = found.model_copy(update={"model_loss": losses})
            _keep(run, found)
    return numbers_of(run, found)


def numbers_of(run: Run, found: Evaluation) -> dict[str, Any]:
    """Return an evaluation of a run as one flat object, with what the training said of dead latents."""
    result = run.result or {}
    return {
        **found.model_dump()["numbers"], **(found.model_loss or {}), "max_cosine": found.max_cosine.model_dump(),
        "run": run.digest, "store": found.store, "held_out": found.held_out,
        "dead_fraction": result.get("dead_fraction"), "dead_window_rows": result.get("dead_window_rows"),
    }  # fmt: skip


def evaluations(run: Run) -> list[Evaluation]:
    """Return what was found about a run's SAE so far, most rows first. Raises: FormatError: a damaged file."""
    try:
        names = sorted(os.listdir(run.path / FOLDER))
    except FileNotFoundError:
        return []
    found = (_kept(run, name.removesuffix(".json")) for name in names if name.endswith(".json"))
    return sorted((e for e in found if e is not None), key=lambda e: -e.rows_measured)


def held_out_numbers(run: Run) -> dict[str, Any]:
    """Return a run's numbers on its held-out documents: of its largest evaluation, else what the fit measured; or none."""
    for found in evaluations(run):
        if found.held_out:
            return numbers_of(run, found)
    return {**run.held_out, "dead_fraction": (run.result or {}).get("dead_fraction")}


def _name(content_digest: str, held_out: bool, rows: int) -> str:
    return sha256_bytes(canonical_json({"content": content_digest, "held_out": held_out, "rows": rows}))


def _kept(run: Run, name: str) -> Evaluation | None:
    """Return the evaluation of this name, if it is there and of this SAE."""
    try:
        found = read_record(Evaluation, run.path, f"{FOLDER}/{name}.json", MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return None
    same = _name(found.content_digest, found.held_out, found.rows_measured) == name
    return found if same and run.result is not None and found.sae_sha256 == run.result["sae_sha256"] else None


def _keep(run: Run, found: Evaluation) -> None:
    """Write an evaluation into its run, unless that is somebody else's or on a read-only medium."""
    if os.access(run.path, os.W_OK):
        durable.make_dir(run.path / FOLDER)
        name = _name(found.content_digest, found.held_out, found.rows_measured)
        run.write(f"{FOLDER}/{name}.json", found.model_dump())
