"""What more rows do to an SAE: dead latents, FVU and coherence against rows, from one store.

    python benchmarks/scaling.py STORES HASH --rows 8125,81250,323000 --study-rows 8125,81250 --runs runs \\
        --results scaling.jsonl --table table.md --picture sae-at-scale.svg

Three recipes, all in batches of 128:

    actstore topk    `trainer fit --rows N`: each row once (over again where N is more than there are), no BOS, AuxK
    reference study  the loop of `trainer.reference_study`, 5 passes over N random rows, BOS among them, no AuxK
    study, centred   the same on rows from which their geometric median is subtracted

All are measured on the same documents, which none has seen, without BOS:

    fvu        Σ‖x - x̂‖² / Σ‖x - mean‖²
    fvu_plain  the same without massive rows (norm over 10 medians), which are few but most of the variance
    dead       share of latents active on none of these rows
    openings   median over latents of the overlap of words of the first 60 characters of its 5 strongest documents
    contexts   the same of the text around its strongest row in each of the 5
    coherent   share of latents whose contexts overlap more than those of 19 in 20 groups of 5 random rows of 5 documents,
               which is 5 % by chance

Every finished training is a line of --results: the command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from actstore.catalog import open_store
from actstore.reader import Store
from trainer import FitConfig, FitProgress, fit, load_sae
from trainer.architectures import chosen_options
from trainer.batches import split_rows
from trainer.charts import ticks
from trainer.config import resolve
from trainer.initialize import geometric_median
from trainer.latents import rows_around
from trainer.metrics import measure
from trainer.reference_study import CPU, FIXED, SETTINGS, train
from trainer.reference_table import Int64, Strongest, openings, overlap, strongest_documents
from trainer.sae import SparseAutoencoder
from trainer.sources import as_sources

HOLDOUT = 0.05
OURS, STUDY, CENTRED = "actstore topk", "reference study", "study, centred"
PANELS = (("fvu_plain", "FVU without massive rows"), ("dead", "dead latents"), ("coherent", "coherent latents"))
COLOURS = {OURS: "#2563eb", STUDY: "#d97706", CENTRED: "#059669"}
CONTROLS = 2000  # groups of random rows


def context(store: Store, row: int) -> str:
    """Return the text around a row: up to 20 tokens before and 8 after, special tokens left out."""
    tokens, special = store.read("tokens", *rows_around(store, row, 20, 8)).tolist(), set(store.vocabulary.special)
    return "".join(store.vocabulary.text(token) for token in tokens if token not in special)


def overlaps(strongest: Strongest, text_of: Callable[[int], str]) -> list[float | None]:
    """Return each latent's overlap of the texts of its strongest rows."""
    return [overlap([text_of(row) for row in strongest.rows_of(i)]) for i in range(len(strongest.counts))]


def without_massive(store: Store, rows: Int64) -> Int64:
    """Return the rows whose norm is at most 10 medians."""
    norms = np.linalg.norm(store.take("acts", rows).astype(np.float32), axis=1)
    return rows[norms <= 10 * np.median(norms)]


def numbers(sae: SparseAutoencoder, store: Store, held: Int64, chance: list[float]) -> dict[str, float]:
    """Return the measurements of an SAE on held-out rows; `chance` is what `by_chance` gives."""
    found, plain = (measure(sae, store, rows, CPU).all_rows.numbers() for rows in (held, without_massive(store, held)))
    strongest, (texts, owners) = strongest_documents(sae, store, held), openings(store)
    coherences = {
        "openings": overlaps(strongest, lambda row: texts[owners[row]]),
        "contexts": overlaps(strongest, lambda row: context(store, row)),
    }
    known = {name: [v for v in values if v is not None] for name, values in coherences.items()}
    high = chance[int(0.95 * len(chance))]
    return {
        "fvu": found["fvu"], "fvu_plain": plain["fvu"], "l0": found["l0"],
        "dead": float((strongest.counts == 0).double().mean()),
        **{name: statistics.median(values) if values else 0.0 for name, values in known.items()},
        "coherent": sum(v > high for v in known["contexts"]) / len(strongest.counts),
    }  # fmt: skip


def by_chance(store: Store, held: Int64) -> list[float]:
    """Return the overlaps of contexts of random rows, each group of 5 from different documents, in ascending order."""
    generator, found = np.random.default_rng(0), []
    documents = np.split(held, np.flatnonzero(np.diff(store.take("documents", held))) + 1)
    for _ in range(CONTROLS):
        chosen = generator.choice(len(documents), min(5, len(documents)), replace=False)
        rows = [int(generator.choice(documents[i])) for i in chosen]
        found.append(overlap([context(store, row) for row in rows]) or 0.0)
    return sorted(found)


def by_ours(
    store: Store, rows: int, seeds: tuple[int, ...], options: argparse.Namespace, progress: FitProgress
) -> Iterator[tuple[int, SparseAutoencoder]]:
    """Yield (seed, SAE) of one fleet."""
    config = FitConfig(
        n_latents=(options.n_latents,), k=(options.k,), seed=seeds, rows=rows, batch_size=options.batch_size,
        holdout=HOLDOUT, skip_positions=1, exclude_special=True,
    )  # fmt: skip
    for result in fit(store, config, options.runs, progress=progress):
        yield result.config.seed, load_sae(result.digest, options.runs)


def by_study(
    store: Store, rows: int, seeds: tuple[int, ...], options: argparse.Namespace, progress: FitProgress, centred: bool = False
) -> Iterator[tuple[int, SparseAutoencoder]]:
    """Yield (seed, SAE) of the study's loop on random rows, in the order of the store."""
    split = split_rows(store, FitConfig(holdout=HOLDOUT))
    rows = min(rows, split.n_train)
    chosen = np.sort(np.random.default_rng(0).permutation(split.n_train)[:rows])
    x = as_sources(store).take(chosen if split.train is None else split.train[chosen]).x
    centre = geometric_median(x) if centred else torch.zeros_like(x[0])
    for seed in seeds:
        own = {"n_latents": options.n_latents, "k": options.k, "seed": seed, "batch_size": options.batch_size}
        config = FitConfig(**{**FIXED, **SETTINGS, **own})
        (sae,) = resolve(config, store.d_model, rows, chosen_options(config))
        trained, _ = train(x - centre, sae, progress)
        with torch.no_grad():  # put back into the units of the store
            trained.b_enc.sub_(trained.W_enc @ centre)
            trained.b_dec.add_(centre)
        yield seed, trained


RECIPES: dict[str, Callable[..., Iterator[tuple[int, SparseAutoencoder]]]] = {
    OURS: by_ours,
    STUDY: by_study,
    CENTRED: partial(by_study, centred=True),
}


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown, seeds averaged."""
    lines = [
        "| recipe | rows | seeds | FVU | without massive rows | dead | coherence of openings | of contexts | coherent |",
        "|" + " --- |" * 9,
    ]
    for name, rows in sorted({(r["recipe"], r["rows"]) for r in results}):
        mine = [r for r in results if (r["recipe"], r["rows"]) == (name, rows)]
        mean = {
            key: statistics.mean(r[key] for r in mine) for key in ("fvu", "fvu_plain", "dead", "openings", "contexts", "coherent")
        }
        lines.append(
            f"| {name} | {rows:,} | {len(mine)} | {mean['fvu']:.4f} | {mean['fvu_plain']:.4f} | {mean['dead']:.1%} "
            f"| {mean['openings']:.4f} | {mean['contexts']:.4f} | {mean['coherent']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def short(rows: int) -> str:
    """Return a number of rows as the axis shows it."""
    return f"{rows / 1e6:.2g}M" if rows >= 1e6 else f"{rows / 1e3:.2g}k" if rows < 1e4 else f"{rows / 1e3:.0f}k"


def picture(results: list[dict[str, Any]]) -> str:
    """Return an SVG of three panels: a number against rows (logarithmic), a line a recipe, a dot a seed."""
    width, height, left, top, bottom = 300, 250, 48, 26, 46
    low, high = (np.log10(f([r["rows"] for r in results])) for f in (min, max))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width} {height + 22}" font-family="sans-serif"',
        ' font-size="11">',
        f'<rect width="{3 * width}" height="{height + 22}" fill="white"/>',
    ]
    for i, (key, title) in enumerate(PANELS):
        x0, x1, y0, y1 = i * width + left, (i + 1) * width - 16, height - bottom, top
        chance = 0.05 if key == "coherent" else 0.0
        levels = ticks(0.0, max([r[key] for r in results] + [chance]))
        ceiling = levels[-1]

        def at(rows: float, value: float, x0: int = x0, x1: int = x1, y0: int = y0, y1: int = y1, c: float = ceiling) -> str:
            share = (np.log10(rows) - low) / ((high - low) or 1)
            return f"{x0 + 8 + share * (x1 - x0 - 16):.1f},{y0 + value / c * (y1 - y0):.1f}"

        parts.append(f'<text x="{(x0 + x1) / 2}" y="16" text-anchor="middle" font-weight="bold">{title}</text>')
        for value in levels:
            y = at(10**low, value).split(",")[1]
            parts.append(f'<line x1="{x0}" x2="{x1}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 - 4}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for rows in sorted({r["rows"] for r in results}):
            x = at(rows, 0).split(",")[0]
            parts.append(f'<text x="{x}" y="{y0 + 15}" text-anchor="middle">{short(rows)}</text>')
        parts.append(f'<text x="{(x0 + x1) / 2}" y="{y0 + 32}" text-anchor="middle">rows (logarithmic)</text>')
        if chance:
            a, b = at(10**low, chance), at(10**high, chance)
            parts.append(f'<polyline points="{a} {b}" stroke="#666" stroke-dasharray="4 3" fill="none"/>')
        for name, colour in COLOURS.items():
            mine = sorted((r["rows"], r[key]) for r in results if r["recipe"] == name)
            means = [(n, statistics.mean(v for m, v in mine if m == n)) for n in sorted({n for n, _ in mine})]
            parts.append(f'<polyline points="{" ".join(at(*p) for p in means)}" stroke="{colour}" stroke-width="2" fill="none"/>')
            for point in mine:
                x, y = at(*point).split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"><title>{name}: {point[1]:.4g}</title></circle>')
    for i, (name, colour) in enumerate([*COLOURS.items(), ("chance", "#666")]):
        parts.append(f'<rect x="{left + i * 190}" y="{height + 4}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18 + i * 190}" y="{height + 10}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def counts(text: str) -> tuple[int, ...]:
    """Return a comma list of integers."""
    return tuple(int(part) for part in text.split(",") if part)


def main() -> None:
    """Train what is missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path)
    parser.add_argument("hash")
    parser.add_argument("--rows", type=counts, default=(8125, 81250, 2_437_500), help="of actstore topk, comma list")
    parser.add_argument("--study-rows", type=counts, default=(8125, 81250), help="of the reference study's loop, comma list")
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=counts, default=(42, 43))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("scaling.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    store = open_store(options.hash, options.stores)
    held = split_rows(store, FitConfig(holdout=HOLDOUT, skip_positions=1, exclude_special=True)).held_out
    chance = by_chance(store, held)
    about = {"store": store.digest, **{name: getattr(options, name) for name in ("n_latents", "k", "batch_size")}}
    lines = options.results.read_text().split("\n")[:-1] if options.results.exists() else []  # a torn last line is redone
    results = [r for r in map(json.loads, lines) if about.items() <= r.items()]
    for recipe, rows in [*((OURS, n) for n in options.rows), *product((STUDY, CENTRED), options.study_rows)]:
        done = {r["seed"] for r in results if (r["recipe"], r["rows"]) == (recipe, rows)}
        seeds = tuple(seed for seed in options.seeds if seed not in done)
        if not seeds:
            continue
        with tqdm(desc=f"{recipe}, {rows:,} rows", unit="row", unit_scale=True, file=sys.stderr, mininterval=10) as bar:
            progress = FitProgress(on_step=lambda n, latest, bar=bar: bar.update(n) and None)
            for seed, sae in RECIPES[recipe](store, rows, seeds, options, progress):
                line = {**about, "recipe": recipe, "rows": rows, "seed": seed, **numbers(sae, store, held, chance)}
                results.append(line)
                with options.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    found = table(results) + f"\nChance: contexts {statistics.median(chance):.4f}, coherent 5 %.\n"
    if options.table:
        options.table.write_text(found)
    if options.picture:
        options.picture.write_text(picture(results))
    print(found)


if __name__ == "__main__":
    main()
