"""`trainer fit --preset reference`: the reference study's run, and its table on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actstore.reader import Store

from . import output
from .fleet import fleet_progress

if TYPE_CHECKING:
    from trainer.reference_table import StudyTable

LINES = (  # name, its words, its format
    ("rows", "rows measured", ","), ("documents", "documents", ","), ("initial_mse", "initial MSE, an element", ".4g"),
    ("final_mse", "final MSE, an element", ".4g"), ("reduction", "reduction", ".1%"),
    ("reconstruction_mse", "MSE over all rows, an element", ".4g"), ("explained_variance", "explained variance", ".4f"),
    ("mean_latents_per_row", "latents a row", ".4g"), ("live", "live latents", ","), ("dead", "dead latents", ","),
    ("dead_window_rows", "dead: active on none of so many rows", ","), ("median_coherence", "median coherence", ".3f"),
    ("coherence_is_1", "coherence = 1.0", ","), ("coherence_over_0.3", "coherence > 0.3", ","),
    ("median_context_coherence", "median coherence of contexts", ".3f"),
)  # fmt: skip
WORDS = 50  # characters of a prompt


def run_study(store: Store, given: Mapping[str, Any], runs: Path, as_json: bool) -> None:
    """Train the study's SAE, or find it trained; print its table on stderr and its digest, or all as JSON, on stdout."""
    from trainer.reference_study import fit_study
    from trainer.reference_table import study_table

    with fleet_progress() as progress:
        run, repeated = fit_study(store, given, runs, progress)
    if repeated:
        output.note("already trained: nothing to do")
    table = study_table(run, store)
    if as_json:
        output.print_json({"runs": [{"digest": run.digest, "metrics": run.result, "repeated": repeated}], **table.as_json()})
        return
    _print(table)
    click.echo(run.digest)


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _print(table: StudyTable) -> None:
    honest = table.honest or {}
    numbers = Table(
        "",
        "reference",
        "honest",
        title="reference: the rows it was trained on, its definitions. honest: text of unseen documents, no BOS or padding.",
    )
    for name, words, form in LINES:
        numbers.add_row(words, _shown(table.reference.get(name), form), _shown(honest.get(name), form))
    latents = Table(
        "latent", *(f"{side} {what}" for side in ("reference:", "honest:") for what in ("max", "coherence", "prompt"))
    )
    for latent in table.latents:
        cells = [str(latent["latent"])]
        for side in ("reference", "honest"):
            found = latent[side] or {"max_activation": None, "coherence": None, "prompt": ""}
            prompt = found["prompt"]
            middle = max(0, prompt.find("«") - WORDS // 2) if side == "honest" else 0
            cells += [
                _shown(found["max_activation"], ".4g"),
                _shown(found["coherence"], ".2f"),
                repr(prompt[middle : middle + WORDS]),
            ]
        latents.add_row(*map(Text, cells))
    console = Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=170)
    console.print(numbers, latents)
    if table.honest is None:
        output.note("the store holds no documents but the study's: capture more (--max-documents) for the honest numbers")
