"""`trainer export`, `import`, `push`: finished SAEs in the formats of other libraries, theirs among our runs, ours on the hub."""

from __future__ import annotations

from pathlib import Path

import click

from actstore import catalog

from . import output
from .options import DEVICE, JSON, RUNS, STORES

FORMAT = click.option(
    "--format", "format_", required=True, metavar="NAME", help="saelens, dictionary_learning, sparsify, actstore (ours); export only: delphi, neuronpedia."
)  # fmt: skip


@click.command("export")
@click.argument("run")
@FORMAT
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write; must be empty or new."
)
@STORES
@RUNS
@JSON
@output.command
def export_command(run: str, format_: str, out: Path, stores: Path, runs: Path, as_json: bool) -> None:
    """Write a finished run's SAE in another library's format."""
    from trainer.checkpoint import find_run, run_sources
    from trainer.formats import export_run

    found = find_run(run, runs)
    files = export_run(found, format_, out, lambda: run_sources(found, lambda digest: catalog.open_store(digest, stores)))
    if as_json:
        output.print_json({"format": format_, "files": [str(f) for f in files]})
    else:
        click.echo("\n".join(map(str, files)))


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@FORMAT
@click.option("--store", "store_prefix", metavar="HASH", help="Store of the activations that the SAE reads; measured on it.")
@click.option("--target-store", "target_prefix", metavar="HASH", help="Row-aligned store that a transcoder reconstructs.")
@click.option(
    "--holdout", type=click.FloatRange(0, 1, max_open=True), default=0.02, show_default=True,
    help="Fraction of the documents to measure on: those that a fit with this fraction holds out.",
)  # fmt: skip
@click.option("--skip-positions", type=click.IntRange(0), default=0, show_default=True, help="Leave out the first N positions.")
@DEVICE
@STORES
@RUNS
@JSON
@output.command
def import_command(
    folder: Path, format_: str, store_prefix: str | None, target_prefix: str | None, holdout: float, skip_positions: int,
    device: str, stores: Path, runs: Path, as_json: bool,
) -> None:  # fmt: skip
    """Make a finished run of an SAE that another library wrote; prints its digest. Nothing in FOLDER is executed."""
    from trainer.formats import import_run
    from trainer.sources import aligned

    inputs, targets = ([catalog.open_store(p, stores)] if p else [] for p in (store_prefix, target_prefix))
    run = import_run(
        folder, format_, runs, aligned(inputs, targets) if inputs else None,
        holdout=holdout, skip_positions=skip_positions, device=device,
    )  # fmt: skip
    if as_json:
        output.print_json({"digest": run.digest, "arch": run.config.arch, "metrics": (run.result or {}).get("held_out", {})})
    else:
        click.echo(run.digest)


@click.command("push")
@click.argument("run")
@click.argument("url", metavar="hf://USER/REPO")
@click.option("--format", "format_", default="saelens", show_default=True, metavar="NAME", help="Format, beside our own.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="List the files and print the model card; upload nothing.")
@STORES
@RUNS
@JSON
@output.command
def push_command(run: str, url: str, format_: str, private: bool, dry_run: bool, stores: Path, runs: Path, as_json: bool) -> None:
    """Upload a finished run to the Hugging Face hub, with a model card. Log in with `hf auth login` or $HF_TOKEN."""
    from trainer.checkpoint import find_run, run_sources
    from trainer.hub import push_run

    found = find_run(run, runs)
    opener = lambda: run_sources(found, lambda digest: catalog.open_store(digest, stores))  # noqa: E731
    files, card = push_run(found, url, format_, opener, private=private, dry_run=dry_run)
    if as_json:
        output.print_json({"dry_run": dry_run, "files": dict(files), "card": card})
        return
    click.echo("\n".join(f"{size:12} {path}" for path, size in files) + (f"\n\n{card}" if dry_run else ""))
    if dry_run:
        output.note("nothing was uploaded: this was --dry-run")
