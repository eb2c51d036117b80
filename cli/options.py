"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _stores(urls: bool, help_: str) -> Callable[[F], F]:
    def convert(context: click.Context, option: click.Parameter, value: str) -> Path | str:
        if "://" in value and not urls:  # not repeated: it may hold a password
            said = "this command works on a folder: `actstore ls URL`, `actstore pull HASH URL`, `trainer fit --store URL#HASH`"
            raise click.BadParameter(said, context, option)
        return value if "://" in value else Path(value)

    return click.option(
        "--stores", type=click.Path(), envvar="ACTSTORE_STORES", default="stores", show_default=True, callback=convert, help=help_
    )


STORES = _stores(False, "Folder of stores (or $ACTSTORE_STORES).")
STORES_OR_URL = _stores(
    True, "Folder of stores (or $ACTSTORE_STORES), or s3://BUCKET/PREFIX, gs, az, file: straight into a bucket."
)
RUNS = click.option(
    "--runs", type=click.Path(path_type=Path), envvar="ACTSTORE_RUNS", default=Path("runs"), show_default=True,
    help="Folder of runs (or $ACTSTORE_RUNS).",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")


def command_line(command: str, without: dict[str, int], rows: int | None) -> str:
    """Return this process's command line as one of another command, with another number of rows.

    Args:
        command: the command's name.
        without: options to leave out, and how many words follow each.
        rows: for --rows; None leaves it out.
    """
    words, kept = sys.argv[2:], []
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name not in {"--rows": 1, **without}:
            kept.append(word)
        elif not equals:
            del words[: {"--rows": 1, **without}[name]]
    return shlex.join(["actstore", command, *kept, *([] if rows is None else ["--rows", str(rows)])])


DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True, help="Where SAEs are computed.")  # fmt: skip
CACHE = click.option("--cache", type=click.Path(path_type=Path), help="Folder for chunks of stores in buckets (or $ACTSTORE_CACHE).  [default: ~/.cache/actstore]")  # fmt: skip
CACHE_SIZE = click.option("--cache-size", default="50GB", show_default=True, metavar="BYTES", help="Most that this process keeps there, such as 200GB.")  # fmt: skip
