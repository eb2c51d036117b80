"""Neuronpedia's features: batch-N.json as SAEDashboard's runner writes them, and skipped_indexes.json; written only.

Source: jbloomAus/SAEDashboard, sae_dashboard/neuronpedia/{neuronpedia_dashboard,neuronpedia_converter,neuronpedia_runner}.py.
The fields that need the model (logits, correlated neurons) are empty: a store holds activations and tokens only. Positions
0 are left out, and so are massive rows, as `trainer.features` does; where a context has one, its activation is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.digests import canonical_json
from trainer.checkpoint import Run
from trainer.exchange import write_folder
from trainer.features import Latent, strongest_latents, window_of
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources

FEATURES_A_FILE, CONTEXTS, BINS = 128, 10, 50
ROWS = 131_072  # searched for contexts, as a report does
ROWS_AT_ONCE = 4096
EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the features of every latent that is active on the first ROWS rows of the run's store."""
    sources, n = open_sources(), run.config.n_latents
    rows = min(sources.rows, ROWS)
    latents = sorted(
        strongest_latents(sae, sources, rows=rows, n_latents=n, n_contexts=CONTEXTS), key=lambda latent: latent.index
    )
    largest = torch.zeros(n)
    largest[[latent.index for latent in latents]] = torch.tensor([latent.max_activation for latent in latents])
    heights = _histograms(sae, sources, rows, largest)
    seq_len = sources.first.key.sequences.seq_len
    corpus = run.key.get("corpus", {})
    shared = {
        "n_prompts_total": -(-rows // seq_len), "n_tokens_in_prompt": seq_len,
        "dataset": corpus.get("dataset") or corpus.get("digest") or "",
    }  # fmt: skip
    about = {"model_id": run.key.get("model", {}).get("name") or run.model, "layer": _layer(run), "sae_set": run.digest[:12]}
    files = {}
    for start in range(0, len(latents), FEATURES_A_FILE):
        features = [_feature(sae, sources, latent, heights, shared) for latent in latents[start : start + FEATURES_A_FILE]]
        files[f"batch-{start // FEATURES_A_FILE}.json"] = [canonical_json({**about, "features": features})]
    skipped = sorted(set(range(n)) - {latent.index for latent in latents})
    files["skipped_indexes.json"] = [
        canonical_json({**about, "layer": str(about["layer"]), "log_sparsity": 1, "skipped_indexes": skipped})
    ]
    return write_folder(out, files)


def _layer(run: Run) -> int:
    parts = str(run.key.get("hook")).split(".")
    return next((int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 6), 0)


@torch.no_grad()
def _histograms(sae: SparseAutoencoder, sources: Sources, rows: int, largest: torch.Tensor) -> npt.NDArray[np.int64]:
    """Return for each latent how many activations lie in each of BINS equal bins up to its largest, (n_latents, BINS)."""
    n = len(largest)
    counts = np.zeros(n * BINS, np.int64)
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(rows, start + ROWS_AT_ONCE)
        code = sae.encode_sparse(sources.take(np.arange(start, stop)).x)
        later = torch.from_numpy(sources.first.read("positions", start, stop) > 0)[code.rows()]
        kept = (code.values > 0) & (code.values <= largest[code.indices]) & later
        at = (code.values[kept] / largest[code.indices[kept]] * BINS).long().clamp_max(BINS - 1)
        counts += np.bincount((code.indices[kept] * BINS + at).numpy(), minlength=n * BINS)
    return counts.reshape(n, BINS)


def _feature(
    sae: SparseAutoencoder, sources: Sources, latent: Latent, heights: npt.NDArray[np.int64], shared: dict[str, Any]
) -> dict[str, Any]:
    width = latent.max_activation / BINS
    return {
        **{name: [] for name in EMPTY},
        **shared,
        "feature_index": latent.index,
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_values": [round((i + 0.5) * width, 3) for i in range(BINS)],
        "freq_hist_data_bar_heights": heights[latent.index].tolist(),
        "activations": _activations(sae, sources, latent),
    }


@torch.no_grad()
def _activations(sae: SparseAutoencoder, sources: Sources, latent: Latent) -> list[dict[str, Any]]:
    """Return a latent's contexts: the text of each token and the activation on it. The group is "top activations"."""
    store, windows = sources.first, [window_of(sources.first, context.row) for context in latent.contexts]
    rows = np.unique(np.concatenate([np.arange(*window) for window in windows]))
    code = sae.encode_sparse(sources.take(rows).x)
    mine = code.indices == latent.index
    values = torch.zeros(len(rows)).index_add(0, code.rows()[mine], code.values[mine]).numpy()
    values[(store.take("positions", rows) == 0) | (values > latent.max_activation * (1 + 1e-5))] = 0
    found = []
    for first, last in windows:
        at = np.searchsorted(rows, np.arange(first, last))
        tokens = [store.vocabulary.text(token) for token in store.read("tokens", first, last).tolist()]
        group = {"bin_min": -1, "bin_max": round(latent.max_activation, 3), "bin_contains": -1}
        found.append({**group, "tokens": tokens, "values": [round(float(value), 3) for value in values[at]]})
    return found
