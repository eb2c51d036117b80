"""`trainer`: train SAEs from stores, and look at them."""

from __future__ import annotations

from pathlib import Path

import click

from actstore.errors import UsageError

from . import output
from .evaluating import compare_command, evaluate_command, info_command, ls_command, open_runs, sources_of
from .fitting import archs_command, fit_command
from .options import JSON, RUNS, STORES
from .sharing import export_command, import_command, push_command


def _check_clash() -> None:
    """Refuse to run when another distribution owns the import name `trainer` too (Coqui's is on PyPI)."""
    from importlib.metadata import packages_distributions

    others = set(packages_distributions().get("trainer", [])) - {"actstore"}
    if others:
        raise UsageError(
            f"the import package 'trainer' also belongs to {', '.join(sorted(others))}, which overwrites ours",
            do=f"pip uninstall {' '.join(sorted(others))} && pip install --force-reinstall --no-deps actstore",
        )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="actstore")
@output.command
def main() -> None:
    """Train any number of sparse autoencoders from one pass over an activation store; look at them, export them.

    Exit codes: 0 done, 1 store damaged, 2 usage, 3 corpus, key or activations, 4 locked, 5 not found or not finished,
    6 disk full or storage failed, 7 format, 8 training diverged, 130 Ctrl-C, 143 SIGTERM.
    """
    _check_clash()


for _command in (
    fit_command, archs_command, ls_command, info_command, evaluate_command, compare_command, export_command, import_command,
    push_command,
):  # fmt: skip
    main.add_command(_command)


@main.command("report")
@click.argument("run", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file to write.  [default: RUNS/report-<first run>.html]"
)
@click.option("--latents", type=click.IntRange(1, 1000), default=24, show_default=True, help="Latents of each run to show.")
@click.option(
    "--rows", type=click.IntRange(1), default=131_072, show_default=True, help="Rows of the store to search for contexts."
)
@STORES
@RUNS
@JSON
@output.command
def report_command(
    run: tuple[str, ...], out: Path | None, latents: int, rows: int, stores: Path, runs: Path, as_json: bool
) -> None:
    """Write one self-contained HTML page about finished runs and print its path."""
    from trainer.report import write_report

    found = open_runs(run, runs)
    target = out or runs / f"report-{found[0].digest[:12]}.html"
    with output.progress("report", None, "row") as bar:
        write_report(
            found, lambda run: sources_of(run, stores), target,
            n_latents=latents, rows=rows, on_rows=lambda n: bar.update(n) and None,
        )  # fmt: skip
    if as_json:
        output.print_json({"report": str(target), "bytes": target.stat().st_size, "runs": [r.digest for r in found]})
    else:
        click.echo(str(target))
