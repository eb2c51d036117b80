"""`trainer fit --preset reference`: the reference study's run, and its table on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import output
from .fleet import fleet_progress

if TYPE_CHECKING:
    from actstore.reader import Store

ABOUT = "reference: the rows it was trained on, its definitions; honest: text of unseen documents, no BOS, no padding"
SIDES, SHOWN = ("reference", "honest"), ("max_activation", "coherence", "prompt")


def run_study(store: Store, given: Mapping[str, Any], runs: Path, as_json: bool) -> None:
    """Train the study's SAE, or find it trained; print its table on stderr and its digest, or all as JSON, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from trainer.reference_study import fit_study
    from trainer.reference_table import study_table

    with fleet_progress("nothing is kept, as it takes seconds") as progress:
        run, repeated = fit_study(store, given, runs, progress)
    if repeated:
        output.note("already trained: nothing to do")
    table = study_table(run, store)
    if as_json:
        output.print_json({"runs": [{"digest": run.digest, "metrics": run.result, "repeated": repeated}], **table})
        return
    numbers, latents = Table("", *SIDES, title=ABOUT), Table("latent", *(f"{side} {name}" for side in SIDES for name in SHOWN))
    for name, value in table["reference"].items():
        numbers.add_row(name.replace("_", " "), _shown(value), _shown((table["honest"] or {}).get(name)))
    for one in table["latents"]:
        latents.add_row(_shown(one["latent"]), *(_shown((one[side] or {}).get(name)) for side in SIDES for name in SHOWN))
    Console(stderr=True, markup=False, width=None if sys.stderr.isatty() else 200).print(numbers, latents)
    if table["honest"] is None:
        output.note("the store holds no documents but the study's: capture more (--max-documents) for the honest numbers")
    click.echo(run.digest)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return repr(value) if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
