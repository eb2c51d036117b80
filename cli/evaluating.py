"""`trainer ls, info, evaluate, compare`: what is known of runs, what can be measured, and runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import complete, output
from .options import DEVICE, JSON, MANY_RUNS, RUN, RUNS, STORES, YES, Count, option, with_options

if TYPE_CHECKING:
    from actstore.errors import FormatError
    from trainer.checkpoint import Run
    from trainer.sources import Sources

NUMBERS = {
    "L0": ("l0", "{:.2f}"), "FVU": ("fvu", "{:.4f}"), "EV": ("explained_variance", "{:.4f}"),
    "EV no special": ("explained_variance_no_special", "{:.4f}"), "CE score": ("ce_score", "{:.4f}"),
    "dead": ("dead_fraction", "{:.2%}"),
}  # fmt: skip
ABOUT = ("run", "arch", "latents", "k", "seed")
HISTOGRAMS = ("density", "density_no_special", "max_cosine")


def open_runs(prefixes: tuple[str, ...], runs: Path) -> list[Run]:
    """Return the runs of some prefixes."""
    from trainer.checkpoint import find_run

    return [find_run(prefix, runs) for prefix in prefixes]


def sources_of(run: Run, stores: Path) -> Sources:
    """Return the stores a run was trained on."""
    from actstore.catalog import open_store
    from trainer.checkpoint import run_sources

    return run_sources(run, lambda digest: open_store(digest, stores))


def _cells(row: dict[str, Any], columns: dict[str, tuple[str, str]] = NUMBERS) -> list[str]:
    return ["" if row.get(name) is None else form.format(row[name]) for name, form in columns.values()]


def _about(row: dict[str, Any]) -> list[str]:
    arch = row["arch"] if row["kind"] == "sae" else f"{row['arch']} {row['kind'].replace('_', ' ')}"
    return [row["digest"][:12], arch, str(row["n_latents"]), str(row["k"]), str(row["seed"])]


def _info_json(run: Run) -> dict[str, Any]:
    from trainer.config import config_json
    from trainer.evaluate import evaluations, held_out_numbers, numbers_of

    result = run.result or {}
    measured = {name: value for name, value in held_out_numbers(run).items() if name not in ("run", "store", "held_out")}
    c, others = run.config, [{"role": o.role, "store": o.store, "hook": o.key.hook} for o in run.others]
    return {
        "digest": run.digest, "store": run.store, "content_digest": run.content_digest, "arch": c.arch, "kind": run.kind,
        "others": others, "n_latents": c.n_latents, "k": c.k, "seed": c.seed, "finished": run.result is not None,
        "rows_seen": result.get("rows_seen", 0),
        "metrics": {**measured, "train": result.get("train", {}), "dead_window_rows": result.get("dead_window_rows")},
        "evaluations": [numbers_of(run, found) for found in evaluations(run)],
        "config": config_json(c), "model": run.model, "key": run.key, "d_model": run.d_model, "path": str(run.path),
    }  # fmt: skip


@click.command("ls")
@RUNS
@JSON
@output.command
def ls_command(runs: Path, as_json: bool) -> None:
    """List the runs, finished and unfinished, with their numbers on held-out documents.

    EV: explained variance, 1 - FVU; CE score: what `trainer evaluate --model-loss` found; dead: at the end of training.
    """
    from actstore.errors import FormatError
    from trainer.checkpoint import list_runs
    from trainer.compare import summary

    def damaged(error: FormatError) -> None:
        output.note(f"left out, damaged: {error}")

    rows, infos = [], []
    for run in sorted(list_runs(runs, damaged), key=lambda r: (r.store, r.config.n_latents, r.config.k)):
        state = "imported" if run.config.imported and run.result else "finished" if run.result else "unfinished"
        try:
            infos.append(_info_json(run))
            row = summary(run)
        except FormatError as error:
            damaged(error)
        else:
            rows.append([*_about(row), state, *_cells(row), run.store[:12], run.model])
    if as_json:
        output.print_json({"runs": infos})
    elif rows:
        output.print_table([*ABOUT, "state", *NUMBERS, "store", "model"], rows)
    else:
        output.note(f"no runs in {runs}: `trainer fit` makes one")


@click.command("info")
@RUN
@RUNS
@JSON
@output.command
def info_command(run: str, runs: Path, as_json: bool) -> None:
    """Show a run: configuration, lineage, numbers and evaluations. RUN is a digest or a unique prefix of one."""
    (found,) = open_runs((run,), runs)
    info = _info_json(found)
    if as_json:
        output.print_json(info)
        return
    measured = info.pop("evaluations")
    for title in ("config", "metrics", "key"):
        for name, value in info.pop(title).items():
            if name not in HISTOGRAMS:
                output.line(f"{title}.{name:{26 - len(title)}} {value}")
    for name, value in info.items():
        output.line(f"{name:27} {value}")
    if measured:
        rows = [[e["store"][:12], "held out" if e["held_out"] else "all", str(e["rows"]), *_cells(e)] for e in measured]
        output.print_table(["evaluated on", "of it", "rows", *NUMBERS], rows)


@click.command("rm")
@RUN
@YES
@RUNS
@JSON
@output.command
def rm_command(run: str, yes: bool, runs: Path, as_json: bool) -> None:
    """Remove a run: weights, checkpoints, numbers. Refused while a fit holds it; its store stays."""
    from trainer.checkpoint import find_folder, remove_run

    folder = find_folder(run, runs)
    output.confirm(f"remove run {folder.name[:12]}?", yes or as_json)
    remove_run(folder)
    output.print_json({"removed": folder.name}) if as_json else output.note(f"removed {folder.name[:12]}")


@click.command("evaluate")
@with_options(
    RUN,
    option("--store", "store_prefix", metavar="HASH", shell_complete=complete.stores, help="Measure all rows of another store.  [default: the rows of held-out documents of the run's own]"),
    option("--rows", type=Count(), metavar="ROWS", help="Measure at most this many rows, the first ones.  [default: all]"),
    option("--model-loss", is_flag=True, help="Also run the store's model with the SAE spliced in: cross-entropy and KL, in nats a token."),
    option("--model", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="FOLDER", help="Folder of that model, if the store was captured from a local one; implies --model-loss."),
    DEVICE, STORES, RUNS, JSON,
)  # fmt: skip
@output.command
def evaluate_command(
    run: str, store_prefix: str | None, rows: int | None, model_loss: bool, model: Path | None, device: str, stores: Path,
    runs: Path, as_json: bool,
) -> None:  # fmt: skip
    """Measure a finished run: explained variance, errors, L0, activity; with and without special tokens and position 0.

    What was found is kept in the run's folder: asking again is free.
    """
    from actstore.catalog import open_store
    from trainer.evaluate import evaluate
    from trainer.sources import as_sources

    (found,) = open_runs((run,), runs)
    sources = as_sources(open_store(store_prefix, stores)) if store_prefix else sources_of(found, stores)
    with output.progress("rows", None, "row") as bar:

        def on_rows(stage: str, n: int, total: int) -> None:
            if bar.total is None or bar.desc.removesuffix(": ") != stage:
                bar.set_description(stage, refresh=False)
                bar.reset(total)
            bar.update(n)

        numbers = evaluate(found, sources, rows, device, with_model=model_loss or model is not None, model=model, on_rows=on_rows)
    if as_json:
        output.print_json(numbers)
        return
    for name in HISTOGRAMS:
        numbers.pop(name)
    plain = {name.removesuffix("_no_special"): numbers.pop(name) for name in list(numbers) if name.endswith("_no_special")}
    output.print_table(["", "all rows", "no special"], [[n, _text(numbers.pop(n)), _text(v)] for n, v in plain.items()])
    for name, value in numbers.items():
        click.echo(f"{name:30}{_text(value)}")


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


MATCHED = {
    "mean cos": ("mean", "{:.3f}"), "median": ("median", "{:.3f}"), "shared": ("shared", "{:.1%}"),
    "both": ("shared_in_both", "{:.1%}"), "MMCS": ("mmcs", "{:.3f}"), "back": ("mmcs_back", "{:.3f}"),
}  # fmt: skip
SPLIT = {
    "fidelity": ("fidelity", "{:.3f}"), "high": ("high", "{:.1%}"), "middle": ("middle", "{:.1%}"), "low": ("low", "{:.1%}"),
    "MMCS": ("mmcs", "{:.3f}"), "back": ("mmcs_back", "{:.3f}"),
}  # fmt: skip


@click.command("compare")
@with_options(
    MANY_RUNS,
    option("--pairs/--no-pairs", default=True, help="Compare the latents of each two runs of one width."),
    option("--threshold", type=click.FloatRange(-1, 1), metavar="COSINE", default=0.9, help="A latent is shared if the cosine to its partner is at least this."),
    RUNS, JSON,
)  # fmt: skip
@output.command
def compare_command(run: tuple[str, ...], pairs: bool, threshold: float, runs: Path, as_json: bool) -> None:
    """Compare finished runs: their numbers; latents matched one to one (equal sizes) or split (smaller in larger).

    EV: explained variance on held-out documents; CE score: if `trainer evaluate --model-loss` was asked for; max cos: median
    over latents of the largest cosine to another latent. MMCS: mean of the largest cosines to the other SAE, and back.
    """
    from trainer.compare import compare

    with output.progress("pairs", len(run) * (len(run) - 1) // 2 if pairs else 0, "pair") as bar:
        found = compare(open_runs(run, runs), threshold, pairs, lambda: bar.update(1) and None)
    if as_json:
        output.print_json(found)
        return
    rows = [[*_about(r), *_cells(r), f"{r['max_cosine']['median']:.3f}", r["store"][:12], r["hook"]] for r in found["runs"]]
    output.print_table([*ABOUT, *NUMBERS, "max cos", "store", "hook"], rows)
    of = {kind: [(p["a"][:8], p["b"][:8], p[kind]) for p in found["pairs"] if kind in p] for kind in ("stability", "splitting")}
    if of["stability"]:
        click.echo(
            f"\nmatched one to one; shared: cosine at least {threshold:g}; both: with the same partner in the decoder and the encoder"
        )
        sides = [[a, b, side, *_cells(s[side] | s, MATCHED)] for a, b, s in of["stability"] for side in ("decoder", "encoder")]
        output.print_table(["run", "with", "rows of", *MATCHED], sides)
    if found["pw_mcc"] is not None:
        click.echo(f"PW-MCC {found['pw_mcc']:.3f}")
    if of["splitting"]:
        click.echo("\nlatents of the smaller SAE in the larger: how many have 0, 1, 2, 3 or more children of cosine at least 0.3")
        parents = [[a, b, *map(str, s["children"]), *_cells(s, SPLIT)] for a, b, s in of["splitting"]]
        output.print_table(["run", "in", *"0123", *SPLIT], parents)
