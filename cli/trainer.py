"""`trainer`: train SAEs from stores, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore import catalog
from actstore.errors import UsageError

from . import output
from .fitting import archs_command, fit_command
from .labelling import label_command
from .looking import features_command, report_command
from .options import DEVICE, JSON, RUNS, STORES
from .sharing import export_command, import_command, push_command

if TYPE_CHECKING:
    from trainer.checkpoint import Run
    from trainer.sources import Sources


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


main.add_command(fit_command)
main.add_command(archs_command)
main.add_command(export_command)
main.add_command(import_command)
main.add_command(push_command)
main.add_command(features_command)
main.add_command(report_command)
main.add_command(label_command)


def _open_runs(prefixes: tuple[str, ...], runs: Path) -> list[Run]:
    from trainer.checkpoint import find_run

    return [find_run(prefix, runs) for prefix in prefixes]


def _sources_of(run: Run, stores: Path) -> Sources:
    from trainer.checkpoint import run_sources

    return run_sources(run, lambda digest: catalog.open_store(digest, stores))


def _info_json(run: Run) -> dict[str, Any]:
    from trainer.config import config_json

    result = run.result or {}
    return {
        "digest": run.digest,
        "store": run.store,
        "content_digest": run.content_digest,
        "arch": run.config.arch,
        "kind": run.kind,
        "others": [{"role": o.role, "store": o.store, "hook": o.key.hook} for o in run.others],
        "n_latents": run.config.n_latents,
        "k": run.config.k,
        "seed": run.config.seed,
        "finished": run.result is not None,
        "rows_seen": result.get("rows_seen", 0),
        "metrics": {
            **result.get("held_out", {}),
            "train": result.get("train", {}),
            "dead_fraction": result.get("dead_fraction"),
            "dead_window_rows": result.get("dead_window_rows"),
        },
        "config": config_json(run.config),
        "model": run.model,
        "key": run.key,
        "d_model": run.d_model,
        "path": str(run.path),
    }


@main.command("ls")
@RUNS
@JSON
@output.command
def ls_command(runs: Path, as_json: bool) -> None:
    """List the runs, finished and unfinished, with their held-out numbers."""
    from trainer.checkpoint import list_runs

    found = list_runs(runs, on_damage=lambda error: output.note(f"left out, damaged: {error}"))
    if as_json:
        output.print_json({"runs": [_info_json(run) for run in found]})
        return
    rows = []
    for run in sorted(found, key=lambda r: (r.store, r.config.n_latents, r.config.k)):
        held = (run.result or {}).get("held_out") or {}
        numbers = [f"{held[name]:.4f}" if held.get(name) is not None else "" for name in ("l0", "fvu", "explained_variance")]
        dead_share = (run.result or {}).get("dead_fraction")
        dead = "" if dead_share is None else f"{dead_share:.2%}"
        c = run.config
        state = "imported" if c.imported and run.result else "finished" if run.result else "unfinished"
        arch = c.arch if run.kind == "sae" else f"{c.arch} {run.kind.replace('_', ' ')}"
        rows.append(
            [run.digest[:12], state, arch, str(c.n_latents), str(c.k), str(c.seed), *numbers, dead, run.store[:12], run.model]
        )
    if rows:
        output.print_table(["run", "state", "arch", "latents", "k", "seed", "L0", "FVU", "EV", "dead", "store", "model"], rows)
    else:
        output.note(f"no runs in {runs}: `trainer fit` makes one")


@main.command("info")
@click.argument("run")
@RUNS
@JSON
@output.command
def info_command(run: str, runs: Path, as_json: bool) -> None:
    """Show a run: configuration, lineage and numbers. RUN is a digest or a unique prefix of one."""
    (found,) = _open_runs((run,), runs)
    info = _info_json(found)
    if as_json:
        output.print_json(info)
        return
    for title in ("config", "metrics", "key"):
        for name, value in info.pop(title).items():
            if name != "density":
                click.echo(f"{title}.{name:{26 - len(title)}} {value}")
    for name, value in info.items():
        click.echo(f"{name:27} {value}")


@main.command("evaluate")
@click.argument("run")
@click.option(
    "--store",
    "store_prefix",
    metavar="HASH",
    help="Measure all rows of another store.  [default: held-out rows of the run's own]",
)
@click.option("--rows", type=click.IntRange(1), help="Measure at most this many rows.")
@DEVICE
@STORES
@RUNS
@JSON
@output.command
def evaluate_command(
    run: str, store_prefix: str | None, rows: int | None, device: str, stores: Path, runs: Path, as_json: bool
) -> None:
    """Measure a finished run: explained variance with and without special tokens, error, L0, activity."""
    from trainer.evaluate import evaluate
    from trainer.sources import as_sources

    (found,) = _open_runs((run,), runs)
    sources = as_sources(catalog.open_store(store_prefix, stores)) if store_prefix else _sources_of(found, stores)
    numbers = evaluate(found, sources, rows, device)
    if as_json:
        output.print_json(numbers)
        return
    for name, value in numbers.items():
        if name != "density":
            click.echo(f"{name:30} {value:.6g}" if isinstance(value, float) else f"{name:30} {value}")
