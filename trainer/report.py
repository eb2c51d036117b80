"""One self-contained HTML file about some runs: numbers, curves, lineage, and a page for every latent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shlex
from collections.abc import Callable, Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from actstore import durable
from actstore.errors import StoreNotFound, UsageError
from actstore.reader import Store
from trainer.charts import COLOURS, Series, bar_chart, line_chart, scatter_chart
from trainer.checkpoint import Run
from trainer.features import Features, load_features
from trainer.inlined import inlined
from trainer.saved import read_metrics
from trainer.scan import SUBSET_FIELD, features_of
from trainer.sources import Sources


def write_report(
    runs: list[Run], open_sources: Callable[[Run], Sources], out: Path, *, rows: int | None = None, model: str | None = None,
    corpus: tuple[Path, ...] = (), subset_field: str = SUBSET_FIELD, device: str = "auto",
    labels: Mapping[str, Mapping[int, str]] = MappingProxyType({}),
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Write a report of finished runs: one file that needs no network, with every latent of every run in it.

    Args:
        runs: at least one finished run; unfinished ones are refused.
        open_sources: opens a run's stores; a run whose store is gone shows what it has, without texts.
        out: the HTML file; an existing one is replaced.
        rows, model, corpus, subset_field, device, on_rows: of the features, see `scan.features_of`.
        labels: by run digest, what latents are called.

    Returns: `out`.
    Raises: UsageError: no run. StoreNotFound: an unfinished one. DiskFull, StorageFailed; and as `scan.features_of`.
    """
    if not runs:
        raise UsageError("no run to report on", do="`trainer ls` lists the runs")
    for run in runs:
        run.finished()
    runs = list({run.digest: run for run in runs}.values())
    metrics = {run.digest: read_metrics(run.path) for run in runs}
    sources: dict[str, Sources] = {}
    for run in runs:
        with contextlib.suppress(StoreNotFound):
            sources[run.digest] = open_sources(run)
    made = features_of(
        [run for run in runs if run.digest in sources], lambda run: sources[run.digest], rows=rows, model=model, corpus=corpus,
        subset_field=subset_field, device=device, on_rows=on_rows,
    )  # fmt: skip
    here = {one.run.digest: one for one in made}
    features = [here.get(run.digest) or load_features(run) for run in runs]
    stores = [sources[run.digest].first if run.digest in sources else None for run in runs]
    html = _page(runs, metrics, features, stores, labels)
    durable.make_dir(out.parent)
    durable.write_new(out.parent, out.name, [html.encode()], replace=True)
    return out


def _page(
    runs: list[Run], metrics: dict[str, list[dict[str, float]]], features: list[Features | None], stores: list[Store | None],
    labels: Mapping[str, Mapping[int, str]],
) -> str:  # fmt: skip
    blocks, about = inlined(features, stores)
    for run, one in zip(runs, about, strict=True):
        one |= {
            "digest": run.digest[:12],
            "label": run.label,
            "labels": {str(i): t for i, t in labels.get(run.digest, {}).items()},
        }
    script, style = (resources.files("trainer").joinpath(f"report.{kind}").read_text("utf-8") for kind in ("js", "css"))
    held = [(run.label, run.held_out) for run in runs]
    points = [Series(label, [(h["l0"], h["fvu"])] if h.get("fvu") is not None else []) for label, h in held]
    return _environment().get_template("report.html.j2").render(
        runs=runs, labels={run.digest: run.label for run in runs}, features=features, blocks=blocks, about=about,
        script=script, style=style, colours=COLOURS, version=version("actstore"),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        loss_chart=_curves(runs, metrics, "loss", "training loss"),
        fvu_chart=_curves(runs, metrics, "fvu", "fraction of variance unexplained"),
        pareto_chart=scatter_chart(points, "L0, active latents a row", "FVU"),
        density_chart=_histogram(
            features, lambda one: np.log10(one.density[one.density > 0]), np.arange(-6, 0.01, 0.25),
            "log10 of the share of rows a latent is active on",
        ),
        cosine_chart=_histogram(
            features, lambda one: one.arrays["cosines"][:, 0], np.arange(0, 1.01, 0.04), "largest cosine to another decoder row"
        ),
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trainer", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.2f} %"
    environment.filters["quote"] = lambda value: shlex.quote(value)
    environment.filters["short"] = lambda value: "–" if value is None else f"{value:.4g}"
    return environment


def _curves(runs: list[Run], metrics: dict[str, list[dict[str, float]]], name: str, label: str) -> str:
    series = [Series(run.label, [(line["rows"], line[name]) for line in metrics[run.digest]]) for run in runs]
    return line_chart(series, "rows seen", label)


def _histogram(features: list[Features | None], values: Callable[[Features], Any], edges: Any, label: str) -> str:
    """Return a chart of a number of each latent; a run without features has an empty histogram, so that colours stay."""
    found = [([] if one is None else np.clip(values(one), edges[0], edges[-1])) for one in features]
    named = [
        ("" if one is None else one.run.label, np.histogram(v, edges)[0].tolist()) for one, v in zip(features, found, strict=True)
    ]
    return bar_chart(edges.tolist(), named, label, "latents") if any(features) else ""
