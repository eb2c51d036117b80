"""Runs side by side: their numbers, and how far each two of one width hold the same latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from actstore.errors import UsageError
from trainer.checkpoint import Run, load_sae
from trainer.evaluate import held_out_numbers
from trainer.geometry import cosine_histogram, max_cosines
from trainer.stability import splitting, stability

SHOWN = (
    "rows", "l0", "fvu", "explained_variance", "explained_variance_no_special", "ce_score", "kl_score", "dead_fraction",
    "inactive_fraction", "max_cosine",
)  # fmt: skip


def summary(run: Run) -> dict[str, Any]:
    """Return what a table shows of a run: its configuration, and numbers on held-out documents, None where not measured."""
    numbers, c = held_out_numbers(run), run.config
    about = {"digest": run.digest, "store": run.store, "hook": run.key["hook"], "arch": c.arch, "kind": run.kind}
    return {**about, "n_latents": c.n_latents, "k": c.k, "seed": c.seed, **{name: numbers.get(name) for name in SHOWN}}


def compare(
    runs: list[Run], threshold: float = 0.9, pairs: bool = True, on_pair: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compare finished runs.

    Args:
        runs: the runs.
        threshold: a latent is shared by two SAEs if the cosine to its partner is at least this.
        pairs: compare latents of each two runs whose rows have the same widths; 190 pairs for 20 runs.
        on_pair: called after each pair.

    Returns: `runs`, a `summary` each; `pairs`, each with the digests `a` and `b` and, of equally many latents, `stability`,
        else `splitting` of the smaller one, a, in the larger one; `pw_mcc`, the mean over pairs of the decoders' mean cosine.
    Raises: UsageError: scipy is missing, or no two different runs are left to pair. StoreNotFound: a run is unfinished.
    """
    if pairs and len({run.digest for run in runs}) < len(runs):
        raise UsageError("a run is named twice", do="name each run once")
    found: dict[str, Any] = {"runs": [summary(run) for run in runs], "pairs": []}
    for i, run in enumerate(runs):
        sae, row = load_sae(run.path), found["runs"][i]
        row["max_cosine"] = row["max_cosine"] or cosine_histogram(max_cosines(sae.W_dec)[0]).model_dump()
        for other in runs[i + 1 :] if pairs else []:
            if other.widths != run.widths:
                continue
            second = load_sae(other.path)
            if run.config.n_latents == other.config.n_latents:
                pair = {"a": run.digest, "b": other.digest, "stability": stability(sae, second, threshold)}
            else:
                (a, small), (b, large) = sorted(((run, sae), (other, second)), key=lambda one: one[0].config.n_latents)
                pair = {"a": a.digest, "b": b.digest, "splitting": splitting(small, large)}
            found["pairs"].append(pair)
            on_pair()
    means = [pair["stability"]["decoder"].get("mean") for pair in found["pairs"] if "stability" in pair]
    measured = [mean for mean in means if mean is not None]
    return {**found, "pw_mcc": float(np.mean(measured)) if measured else None}
