"""One self-contained HTML file about some runs: numbers, curves, density, and what the strongest latents fire on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from actstore import durable
from actstore.errors import StoreNotFound, UsageError
from trainer.charts import COLOURS, Series, bar_chart, line_chart
from trainer.checkpoint import Run, load_sae
from trainer.features import strongest_latents
from trainer.saved import read_metrics
from trainer.sources import Sources

ROWS_LOOKED_AT = 131_072  # rows of the store searched for contexts: a minute for a fleet of small SAEs on two cores


def label_of(run: Run) -> str:
    """Return a run's name in charts and tables."""
    c = run.config
    return f"{c.arch} n={c.n_latents} k={c.k} seed={c.seed} ({run.digest[:8]})"


def write_report(
    runs: list[Run], open_sources: Callable[[Run], Sources], out: Path, *, n_latents: int = 24, n_contexts: int = 5,
    rows: int = ROWS_LOOKED_AT, on_rows: Callable[[int], None] = lambda rows: None,
) -> Path:  # fmt: skip
    """Write a report of finished runs; the file needs no network and holds no script.

    Args:
        runs: at least one finished run; unfinished ones are refused.
        open_sources: opens a run's stores; a run whose store is gone gets no contexts.
        out: the HTML file; an existing one is replaced.
        n_latents: latents of each run to show.
        n_contexts: contexts of each latent.
        rows: rows of the store to search.
        on_rows: called with the rows just searched.

    Returns: `out`.
    Raises: UsageError: no run, or an unfinished one. DiskFull, StorageFailed.
    """
    if not runs:
        raise UsageError("no run to report on", do="`trainer ls` lists the runs")
    for run in runs:
        if run.result is None:
            raise UsageError("the run is not finished", label_of(run), "run its `trainer fit` again: it goes on where it stopped")
    metrics = {run.digest: read_metrics(run.path) for run in runs}
    latents: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for run in runs:
        try:
            sources = open_sources(run)
        except StoreNotFound:
            missing[run.digest] = f"store {run.store[:12]} is not here, so no contexts are shown"
            continue
        sae = load_sae(run.path)
        latents[run.digest] = strongest_latents(
            sae, sources, rows=rows, n_latents=n_latents, n_contexts=n_contexts, on_rows=on_rows
        )
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            runs=runs,
            labels={run.digest: label_of(run) for run in runs},
            latents=latents,
            missing=missing,
            rows_looked_at=rows,
            colours=COLOURS,
            loss_chart=_curves(runs, metrics, "loss", "training loss"),
            fvu_chart=_curves(runs, metrics, "fvu", "fraction of variance unexplained"),
            density_chart=_densities(runs),
            version=version("actstore"),
        )
    )
    durable.make_dir(out.parent)
    durable.write_new(out.parent, out.name, [html.encode()], replace=True)
    return out


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trainer", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.2f} %"
    environment.filters["short"] = lambda value: "–" if value is None else f"{value:.4g}"
    return environment


def _curves(runs: list[Run], metrics: dict[str, list[dict[str, float]]], name: str, label: str) -> str:
    series = [Series(label_of(run), [(line["rows"], line[name]) for line in metrics[run.digest]]) for run in runs]
    return line_chart(series, "rows seen", label)


def _densities(runs: list[Run]) -> str:
    found = [(label_of(r), r.result["held_out"]["density"]) for r in runs if r.result and r.result["held_out"]]
    if not found:
        return ""
    series = [(label, density["latents"]) for label, density in found]
    return bar_chart(found[0][1]["log10_edges"], series, "log10 of the share of held-out rows a latent is active on", "latents")
