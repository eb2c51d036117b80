"""A run in a notebook: plain dicts and lists of numbers, the SAE when asked for, and the report's tables and figures.

Nothing here needs pandas or matplotlib: a list of dicts goes into either (`pandas.DataFrame(run.metrics)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from actstore.catalog import open_store
from trainer.charts import Series, bar_chart, line_chart
from trainer.checkpoint import Run, load_sae, open_run
from trainer.config import config_json
from trainer.features import Features, load_features
from trainer.labels import shown_labels
from trainer.latents import Latent
from trainer.sae import SparseAutoencoder
from trainer.saved import read_metrics

# A notebook's page is light or dark: text takes its colour, and each line's is readable on both.
COLOURS = ("#3b82f6", "#ea580c", "#2f9e44", "#ae3ec9", "#1098ad", "#e64980", "#b58900", "#868e96")
STYLE = (
    "<style>.actstore svg{max-width:40rem;width:100%;height:auto}.actstore svg text{font-size:12px;fill:currentColor}"
    ".actstore .grid{stroke:currentColor;stroke-opacity:.15}.actstore .line{fill:none;stroke-width:2}"
    ".actstore .bars{fill-opacity:.15;stroke-width:1.6}"
    ".actstore td,.actstore th{text-align:left;padding-right:1rem;overflow-wrap:anywhere}"
    + "".join(
        f".actstore .s{i}{{stroke:{c}}}.actstore .bars.s{i},.actstore b.s{i}{{fill:{c};color:{c}}}" for i, c in enumerate(COLOURS)
    )
    + "</style>"
)
SHOWN = (
    "rows", "explained_variance", "explained_variance_no_special", "fvu", "mse_per_token", "cosine", "l0", "inactive_fraction",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that a notebook draws; `series` has its points for any other tool.

    Args:
        title: what it shows.
        series: label and points (x, y) of each line; of a histogram the left edges of its bins, and their heights.
        svg: the picture, inline SVG.
    """

    title: str
    series: dict[str, list[tuple[float, float]]]
    svg: str

    def _repr_html_(self) -> str:
        marks = " ".join(f'<b class="s{i % len(COLOURS)}">■</b> {escape(label)}' for i, label in enumerate(self.series))
        return f'<div class="actstore">{STYLE}<p>{escape(self.title)}: {marks}</p>{self.svg}</div>'


@dataclass(frozen=True)
class LoadedRun:
    """One run, as `load_run` gives it; a notebook shows it as a page.

    Args:
        run: the run's own record; `digest` and `path` are there too.
        config: its configuration, JSON values.
        metrics: the lines of metrics.jsonl: step, rows, loss, fvu, l0, …
        result: `rows_seen`, `train`, `dead_fraction`, …; None while it is unfinished.
        held_out: metrics of the held-out rows by name; empty without them.
        lineage: store, content_digest, model, hook, corpus, tokenizer, from which everything can be redone.

    Example:
        >>> run = load_run("3fa9")                               # doctest: +SKIP
        >>> run.held_out["explained_variance"]                   # doctest: +SKIP
        0.8731
        >>> codes = run.sae.encode(rows)                         # doctest: +SKIP
    """

    run: Run
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    result: dict[str, Any] | None
    held_out: dict[str, Any]
    lineage: dict[str, str]

    @property
    def digest(self) -> str:
        """The run digest."""
        return self.run.digest

    @property
    def label(self) -> str:
        """A short name, as figures show it."""
        return self.run.label

    @cached_property
    def sae(self) -> SparseAutoencoder:
        """The finished SAE, in the units of the store, loaded when first asked for. Raises: StoreNotFound: unfinished."""
        return load_sae(self.run.path)

    @cached_property
    def features(self) -> Features | None:
        """The features the run has, or None: `trainer features` and `scan.features_of` compute them."""
        return load_features(self.run)

    @cached_property
    def labels(self) -> dict[int, str]:
        """What latents are called, by `trainer label`, with the labels' scores; empty before."""
        return shown_labels(self.run)

    def latent(self, index: int, stores: Path | str | None = None) -> Latent | None:
        """Return all that is known of a latent, its texts read from the store; None without features.

        Raises: UsageError: no such latent. StoreNotFound: the store is not in `stores` (default $ACTSTORE_STORES, ./stores).
        """
        found = self.features
        return None if found is None else found.latent(index, open_store(found.record.store, stores))

    def curves(self, name: str = "fvu", *others: LoadedRun) -> Figure:
        """Return a metric over the rows seen in training, of this run and of others beside it.

        Args:
            name: one of the numbers in `metrics`, such as "loss", "fvu", "l0", "dead_fraction".
            others: runs whose curves are drawn too.
        """
        found = {run.label: [(line["rows"], line[name]) for line in run.metrics if name in line] for run in (self, *others)}
        return Figure(name, found, line_chart([Series(*item) for item in found.items()], "rows seen", name))

    def densities(self, *others: LoadedRun) -> Figure:
        """Return the histogram of how often latents are active on held-out rows, of this run and of others beside it."""
        found = {run.label: run.held_out["density"] for run in (self, *others) if run.held_out.get("density")}
        edges: Sequence[float] = next((d["log10_edges"] for d in found.values()), [])
        axes = ("log10 of the share of held-out rows a latent is active on", "latents")
        svg = bar_chart(edges, [(label, d["latents"]) for label, d in found.items()], *axes) if found else ""
        series = {label: list(zip(edges, d["latents"], strict=False)) for label, d in found.items()}
        return Figure("how often latents are active", series, svg)

    def _repr_html_(self) -> str:
        numbers = {name: self.held_out.get(name) for name in SHOWN if name in self.held_out}
        dead = (self.result or {}).get("dead_fraction")
        rows = [
            *((name, f"{value:.6g}") for name, value in numbers.items() if value is not None),
            ("dead_fraction", "unfinished" if self.result is None else "" if dead is None else f"{dead:.4g}"),
            *self.lineage.items(),
        ]
        table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        figures = [self.curves("loss"), self.curves("fvu"), self.densities()] if self.metrics else []
        drawn = "".join(f"<p>{escape(f.title)}</p>{f.svg}" for f in figures if f.svg)
        return f'<div class="actstore">{STYLE}<p><strong>{escape(self.label)}</strong></p><table>{table}</table>{drawn}</div>'


def load_run(run: str | Path, runs: Path | str | None = None) -> LoadedRun:
    """Return a run to look at, finished or not.

    Args:
        run: a unique prefix of its digest, or the path of its folder.
        runs: folder of runs; default $ACTSTORE_RUNS, else ./runs.

    Raises: UsageError: not a prefix, or ambiguous. StoreNotFound: no such run. FormatError: a file is damaged.
    """
    found = open_run(run, runs)
    corpus, model = found.key["corpus"], found.key["model"]
    lineage = {
        "run": found.digest, "store": found.store, "content_digest": found.content_digest,
        "model": " ".join(filter(None, (found.model_name, model.get("revision"), model.get("digest")))),
        "hook": found.key["hook"],
        "corpus": corpus.get("digest") or f"{corpus['dataset']} {corpus['split']} {corpus['revision']}",
        "tokenizer": found.key["tokenizer"],
    }  # fmt: skip
    return LoadedRun(found, config_json(found.config), read_metrics(found.path), found.result, found.held_out, lineage)
