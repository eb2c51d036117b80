"""`trainer export`, `import`, `push`: finished SAEs in the formats of other libraries, theirs among our runs, ours on the hub."""

from __future__ import annotations

from pathlib import Path

import click

from . import complete, output
from .evaluating import open_runs, sources_of
from .options import DEVICE, JSON, RUN, RUNS, STORES, Count, option, with_options

FORMATS = complete.files_of("trainer.formats")
FORMAT = option(
    "--format",
    "format_",
    required=True,
    metavar="NAME",
    shell_complete=FORMATS,
    help="saelens, dictionary_learning, sparsify, actstore (ours); export only: delphi, neuronpedia.",
)


@click.command("export")
@with_options(
    RUN, FORMAT,
    option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", required=True, help="Folder to write; must be empty or new."),
    STORES, RUNS, JSON,
)  # fmt: skip
@output.command
def export_command(run: str, format_: str, out: Path, stores: Path, runs: Path, as_json: bool) -> None:
    """Write a finished run's SAE in another library's format.

    \b
    trainer export 7be2 --format saelens --out sae
    """
    from trainer.formats import export_run

    (found,) = open_runs((run,), runs)
    files = export_run(found, format_, out, lambda: sources_of(found, stores))
    if as_json:
        output.print_json({"format": format_, "files": [str(f) for f in files]})
    else:
        click.echo("\n".join(map(str, files)))


@click.command("import")
@with_options(
    click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False)),
    FORMAT,
    option("--store", "store_prefix", metavar="HASH", shell_complete=complete.stores, help="Store of the activations that the SAE reads; measured on it."),
    option("--target-store", "target_prefix", metavar="HASH", shell_complete=complete.stores, help="Row-aligned store that a transcoder reconstructs."),
    option("--holdout", type=click.FloatRange(0, 1, max_open=True), metavar="FRACTION", default=0.02, help="Fraction of the documents to measure on: those that a fit with this fraction holds out."),
    option("--skip-positions", type=Count(0), metavar="POSITIONS", default=0, help="Leave out the first positions of each sequence, so many."),
    DEVICE, STORES, RUNS, JSON,
)  # fmt: skip
@output.command
def import_command(
    folder: Path, format_: str, store_prefix: str | None, target_prefix: str | None, holdout: float, skip_positions: int,
    device: str, stores: Path, runs: Path, as_json: bool,
) -> None:  # fmt: skip
    """Make a finished run of an SAE that another library wrote; prints its digest. Nothing in FOLDER is executed."""
    from actstore.catalog import open_store
    from trainer.formats import import_run
    from trainer.sources import aligned

    inputs, targets = ([open_store(p, stores)] if p else [] for p in (store_prefix, target_prefix))
    run = import_run(
        folder, format_, runs, aligned(inputs, targets) if inputs else None,
        holdout=holdout, skip_positions=skip_positions, device=device,
    )  # fmt: skip
    if as_json:
        output.print_json({"digest": run.digest, "arch": run.config.arch, "metrics": (run.result or {}).get("held_out", {})})
    else:
        click.echo(run.digest)


@click.command("push")
@with_options(
    RUN,
    click.argument("url", metavar="hf://USER/REPO"),
    option("--format", "format_", default="saelens", metavar="NAME", shell_complete=FORMATS, help="Format, beside our own."),
    option("--private", is_flag=True, help="Make a new repository private."),
    option("--dry-run", is_flag=True, help="List the files and print the model card; upload nothing."),
    STORES, RUNS, JSON,
)  # fmt: skip
@output.command
def push_command(run: str, url: str, format_: str, private: bool, dry_run: bool, stores: Path, runs: Path, as_json: bool) -> None:
    """Upload a finished run to the Hugging Face hub, with a model card. Log in with `hf auth login` or $HF_TOKEN."""
    from trainer.hub import push_run

    (found,) = open_runs((run,), runs)
    files, card = push_run(found, url, format_, lambda: sources_of(found, stores), private=private, dry_run=dry_run)
    if as_json:
        output.print_json({"dry_run": dry_run, "files": dict(files), "card": card})
        return
    click.echo("\n".join(f"{size:12} {path}" for path, size in files) + (f"\n\n{card}" if dry_run else ""))
    if dry_run:
        output.note("nothing was uploaded: this was --dry-run")
