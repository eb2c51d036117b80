"""`trainer`: train SAEs from stores, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore import catalog
from actstore.errors import UsageError

from . import output
from .fleet import Commas, fleet_progress
from .options import JSON, RUNS, STORES

if TYPE_CHECKING:
    from trainer.checkpoint import Run

DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True, help="Where SAEs are computed.")  # fmt: skip


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


@main.command("fit")
@click.option("--store", "store_prefix", required=True, metavar="HASH", help="Digest of the store, or a unique prefix of it.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML file with any of the options below (n_latents = [1024, 2048]); options given here win.",
)
@click.option("--arch", type=Commas(str, "name"), help="Architectures, comma list.  [default: topk]")
@click.option("--n-latents", "--n-features", type=Commas(int, "integer"), help="Dictionary sizes, comma list.  [default: 2048]")
@click.option("--k", type=Commas(int, "integer"), help="Active latents a row, comma list.  [default: 32]")
@click.option(
    "--lr", type=str, help="Adam's learning rates, comma list, or auto: 2e-4 / sqrt(n_latents / 16384).  [default: auto]"
)
@click.option("--seed", type=Commas(int, "integer"), help="Seeds of the initial weights, comma list.  [default: 42]")
@click.option("--epochs", type=float, help="Passes over the rows; a fraction is a part of one.  [default: 1]")
@click.option("--rows", type=int, help="Rows to train on in all, instead of --epochs.")
@click.option("--batch-size", type=int, help="Rows of a step.  [default: 4096]")
@click.option("--holdout", type=float, help="Fraction of documents held out for evaluation.  [default: 0.02]")
@click.option("--skip-positions", type=int, help="Leave out the first N positions of each sequence.  [default: 0]")
@click.option("--exclude-special", is_flag=True, default=None, help="Leave out rows of special tokens (BOS, EOS, padding).")
@click.option(
    "--shuffle",
    type=click.Choice(["window", "exact"]),
    help="Windows of 512 MiB, or one permutation of all rows in memory.  [default: window]",
)
@click.option("--shuffle-seed", type=int, help="Seed of the order of rows, shared by the fleet.  [default: 0]")
@click.option("--aux-k", type=int, help="Dead latents that help reconstruct the residual.  [default: d_model / 2]")
@click.option("--aux-alpha", type=float, help="Weight of that loss; 0 turns it off.  [default: 1/32]")
@click.option(
    "--dead-after-rows",
    type=int,
    help="A latent is dead after this many rows without activity.  [default: a tenth of the rows, at most 10 million]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Precision of the encoder's product; weights and sums are float32. float32 uses bfloat16 where the result is proven equal.  [default: auto, which is float32]",
)
@click.option(
    "--max-memory",
    metavar="BYTES",
    help="Memory of the SAEs trained at once, such as 8GB; a larger fleet is trained in several passes.  [default: 90% of what is available]",
)
@click.option(
    "--kernel",
    type=click.Choice(["auto", "reference", "fast"]),
    default="auto",
    show_default=True,
    help="How a step is computed; the results agree within rounding.",
)
@DEVICE
@STORES
@RUNS
@JSON
@output.command
def fit_command(
    store_prefix: str, config: Path | None, device: str, kernel: str, max_memory: str | None, stores: Path, runs: Path, as_json: bool,
    lr: str | None, **options: Any,
) -> None:  # fmt: skip
    """Train a fleet of SAEs from a store: every combination of the comma lists, all from the same batches.

    Prints the run digest of each SAE, one a line. A finished fit costs nothing; an interrupted one goes on when the
    same command is run again.
    """
    from actstore.forecast import parse_budget
    from trainer.config import FitConfig, load_config, parse_config
    from trainer.fit import fit

    values = load_config(config) if config else {}
    values |= {name: value for name, value in options.items() if value is not None}
    if values.get("precision") == "auto":
        del values["precision"]
    if lr is not None and lr != "auto":
        values["lr"] = Commas(float, "number").convert(lr, None, None)
    fleet = parse_config(values, FitConfig, "trainer fit")
    memory = int(parse_budget(max_memory).bytes or 0) if max_memory else None
    if memory == 0:
        raise UsageError(f"{max_memory!r} is no amount of memory", do="give bytes, such as --max-memory 8GB")
    store = catalog.open_store(store_prefix, stores)
    with fleet_progress() as progress:
        results = fit(store, fleet, runs, device=device, kernel=kernel, max_memory=memory, progress=progress)
    if all(r.repeated for r in results):
        output.note("already trained: nothing to do")
    if as_json:
        output.print_json({"runs": [{"digest": r.digest, "metrics": r.metrics, "repeated": r.repeated} for r in results]})
        return
    for result in results:
        click.echo(result.digest)


def _open_runs(prefixes: tuple[str, ...], runs: Path) -> list[Run]:
    from trainer.checkpoint import find_run

    return [find_run(prefix, runs) for prefix in prefixes]


def _info_json(run: Run) -> dict[str, Any]:
    from trainer.config import config_json

    result = run.result or {}
    return {
        "digest": run.digest,
        "store": run.store,
        "content_digest": run.content_digest,
        "arch": run.config.arch,
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
        dead = f"{run.result['dead_fraction']:.2%}" if run.result else ""
        c = run.config
        state = "finished" if run.result else "unfinished"
        rows.append(
            [run.digest[:12], state, c.arch, str(c.n_latents), str(c.k), str(c.seed), *numbers, dead, run.store[:12], run.model]
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

    (found,) = _open_runs((run,), runs)
    numbers = evaluate(found, catalog.open_store(store_prefix or found.store, stores), rows, device)
    if as_json:
        output.print_json(numbers)
        return
    for name, value in numbers.items():
        if name != "density":
            click.echo(f"{name:30} {value:.6g}" if isinstance(value, float) else f"{name:30} {value}")


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

    found = _open_runs(run, runs)
    target = out or runs / f"report-{found[0].digest[:12]}.html"
    with output.progress("report", None, "row") as bar:
        write_report(
            found, lambda digest: catalog.open_store(digest, stores), target,
            n_latents=latents, rows=rows, on_rows=lambda n: bar.update(n) and None,
        )  # fmt: skip
    if as_json:
        output.print_json({"report": str(target), "bytes": target.stat().st_size, "runs": [r.digest for r in found]})
    else:
        click.echo(str(target))


@main.command("export")
@click.argument("run")
@click.option("--format", "format_", required=True, help="saelens.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write; must be empty or new."
)
@RUNS
@JSON
@output.command
def export_command(run: str, format_: str, out: Path, runs: Path, as_json: bool) -> None:
    """Write a finished run's SAE in another library's format."""
    from trainer.formats import export_run

    (found,) = _open_runs((run,), runs)
    files = export_run(found, format_, out)
    if as_json:
        output.print_json({"format": format_, "files": [str(f) for f in files]})
        return
    for file in files:
        click.echo(str(file))
