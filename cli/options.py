"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

STORES = click.option(
    "--stores", type=click.Path(path_type=Path), envvar="ACTSTORE_STORES", default=Path("stores"), show_default=True,
    help="Folder of stores (or $ACTSTORE_STORES).",
)  # fmt: skip
RUNS = click.option(
    "--runs", type=click.Path(path_type=Path), envvar="ACTSTORE_RUNS", default=Path("runs"), show_default=True,
    help="Folder of runs (or $ACTSTORE_RUNS).",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
