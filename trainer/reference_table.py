"""The reference study's table of a finished run, number by number, each beside the honest one.

`reference` is measured on the rows that were trained on, BOS and padding among them, by the study's definitions; `honest`
on the text (no BOS, no padding, not first in a sequence) of documents that the study does not see, by the standard ones.

Source: github.com/ashlrai/mechanistic-interpretability, src/mech_interp/sae/analysis.py (`compute_feature_analysis`) and
the scale report; ../shared/research/ecosystem.md, sections 3.1 and 3.2.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actstore.reader import Store
from trainer.checkpoint import Run, load_sae
from trainer.coherence import Strongest, context, of_contexts, of_openings, openings, overlap, strongest_documents, text_rows
from trainer.metrics import measure
from trainer.reference_study import CPU, initial_sae, study_rows
from trainer.sae import SparseAutoencoder
from trainer.sources import as_sources

TOP_ROWS, TOP_LATENTS = 5, 10
COHERENT = 0.3
MARKS = "«»"  # around the strongest token of an honest prompt


@dataclass(frozen=True, slots=True)
class StudyTable:
    """The table of a run.

    Args:
        reference: numbers by the study's definitions.
        honest: the same by the standard ones; None where the store has no further documents.
        latents: the ten of largest |activation|: `latent`, and `reference` and `honest`, each with max_activation,
            coherence and prompt.
    """

    reference: dict[str, Any]
    honest: dict[str, Any] | None
    latents: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {"reference": self.reference, "honest": self.honest, "latents": self.latents}


@dataclass(frozen=True, slots=True)
class StudyLatent:
    """One latent by the study's definitions: the labels of its 5 strongest rows, each once, strongest first."""

    count: int
    max_activation: float
    mean_activation: float
    prompts: list[str]

    @property
    def coherence(self) -> float:
        """The overlap of its labels; 1 for a single one."""
        return 1.0 if len(self.prompts) == 1 else overlap(self.prompts) or 0.0


@torch.no_grad()
def study_latents(sae: SparseAutoencoder, store: Store, rows: int) -> tuple[list[StudyLatent], dict[str, float]]:
    """Return every latent of an SAE by the study's definitions, and the numbers of its reconstruction.

    Args:
        sae: in the units of the store, on the CPU.
        store: the store.
        rows: how many of its first rows; their codes are held in memory, 4 bytes times rows times n_latents.
    """
    x = as_sources(store).take(np.arange(rows)).x
    codes = sae.encode(x)
    mse = torch.mean((x - sae.decode(codes)) ** 2).item()
    variance = torch.var(x, unbiased=False).item()
    texts = list(openings(store).values())
    owners = np.unique(store.read("documents", 0, rows), return_inverse=True)[1].tolist()
    strength, active, latents = codes.abs(), codes != 0, []
    for i, count in enumerate(active.sum(0).tolist()):
        mine = strength[:, i]
        # One top-k a latent, of as many rows as it is active on: which of equal rows come first depends on both.
        best = mine.topk(min(TOP_ROWS, count)).indices.tolist()
        prompts = list(dict.fromkeys(f"doc_{owners[row]}: {texts[owners[row]]}" for row in best))
        mean = mine[active[:, i]].mean().item() if count else 0.0
        latents.append(StudyLatent(count, mine.max().item(), mean, prompts))
    return latents, {
        "reconstruction_mse": mse,
        "explained_variance": 1 - mse / variance if variance > 0 else 0.0,
        "mean_latents_per_row": active.sum(1).float().mean().item(),
    }


def study_table(run: Run, store: Store) -> StudyTable:
    """Return the table of a finished run of `fit_study`. Raises: StoreDamaged, StorageFailed."""
    sae, rows = load_sae(run.path), study_rows(store)
    found, numbers = study_latents(sae, store, rows)
    losses = (run.result or {})["train"]
    first, last, n = losses["initial_loss"], losses["final_loss"], len(found)
    live = [latent for latent in found if latent.count]
    reference = {
        "rows": rows,
        "documents": len(np.unique(store.read("documents", 0, rows))),
        "initial_mse": first,
        "final_mse": last,
        "reduction": 1 - last / first,
        **numbers,
        "live": len(live),
        "dead": n - len(live),
        "dead_window_rows": rows,
        **_coherences([latent.coherence for latent in live]),
        "losses_per_epoch": [losses[name] for name in sorted(losses) if name.startswith("loss_epoch")],
        "weight_bytes": n * store.d_model * 2 * 4,
    }
    held = text_rows(store, rows)
    strongest = strongest_documents(sae, store, held) if len(held) else None
    labels = openings(store)
    order = sorted(range(n), key=lambda i: -found[i].max_activation)[: min(TOP_LATENTS, len(live))]
    latents = [
        {
            "latent": i,
            "reference": {
                "max_activation": found[i].max_activation,
                "coherence": found[i].coherence,
                "prompt": found[i].prompts[0],
            },
            "honest": _honest_latent(i, strongest, store, labels),
        }
        for i in order
    ]
    return StudyTable(reference, None if strongest is None else _honest(run, sae, store, held, strongest, labels), latents)


def _coherences(values: list[float]) -> dict[str, Any]:
    """Return the median of coherences, None where there are none, and how many are 1 and over 0.3."""
    return {
        "median_coherence": statistics.median(values) if values else None,
        "coherence_is_1": sum(value == 1.0 for value in values),
        "coherence_over_0.3": sum(value > COHERENT for value in values),
    }


def _honest(
    run: Run, sae: SparseAutoencoder, store: Store, held: Any, strongest: Strongest, labels: dict[int, str]
) -> dict[str, Any]:
    after = measure(sae, store, held, CPU)
    before = measure(initial_sae(run.config, store.d_model), store, held, CPU)
    first, last = (m.all_rows.squared_error / (len(held) * store.d_model) for m in (before, after))
    live, overlaps = int((strongest.counts > 0).sum()), of_openings(strongest, store, labels)
    around = [value for value in of_contexts(strongest, store) if value is not None]
    return {
        "rows": len(held),
        "documents": len(np.unique(store.take("documents", held))),
        "initial_mse": first,
        "final_mse": last,
        "reduction": 1 - last / first,
        "reconstruction_mse": last,
        "explained_variance": 1 - after.all_rows.fvu(),
        "mean_latents_per_row": after.all_rows.active / len(held),
        "live": live,
        "dead": len(overlaps) - live,
        "dead_window_rows": len(held),
        **_coherences([value for value in overlaps if value is not None]),
        "median_context_coherence": statistics.median(around) if around else None,
    }


def _honest_latent(i: int, strongest: Strongest | None, store: Store, labels: dict[int, str]) -> dict[str, Any] | None:
    rows = strongest.rows_of(i) if strongest is not None else []
    if strongest is None or not rows:
        return None
    documents = [int(store.read("documents", row, row + 1)[0]) for row in rows]
    return {
        "max_activation": float(strongest.values[0, i]),
        "coherence": overlap([labels[document] for document in documents]),
        "prompt": context(store, rows[0], MARKS),
    }
