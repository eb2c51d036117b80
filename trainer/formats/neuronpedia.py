"""Neuronpedia's features: batch-N.json as SAEDashboard's runner writes them, and skipped_indexes.json; written only.

Source: jbloomAus/SAEDashboard, sae_dashboard/neuronpedia/{neuronpedia_dashboard,neuronpedia_converter,neuronpedia_runner}.py.
Everything comes from the run's features (`trainer.scan`): contexts at all strengths, histogram, co-active latents, and the
promoted and suppressed tokens if `trainer features RUN --model FOLDER` was run before. What they do not have is left empty.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore.digests import canonical_json
from trainer import exchange
from trainer.checkpoint import Run
from trainer.features import Features
from trainer.latents import Context, Latent
from trainer.sae import SparseAutoencoder
from trainer.scan import features_of
from trainer.sources import Sources

LATENTS_A_FILE = 128
EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_l1", "correlated_features_pearson",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the features of every latent that is active; the run's own are used, and computed first where it has none.

    Raises: as `features_of`.
    """
    sources = open_sources()
    (features,) = features_of([run], lambda run: sources)
    alive, store = features.arrays["counts"] > 0, sources.first
    latents = [features.latent(i, store) for i in alive.nonzero()[0].tolist()]
    about = {
        "model_id": run.model_name, "layer": exchange.layer_of(run.key["hook"]) or 0,
        "sae_set": run.digest[:12],
    }  # fmt: skip
    files = {}
    for number, start in enumerate(range(0, len(latents), LATENTS_A_FILE)):
        found = [_feature(features, latent) for latent in latents[start : start + LATENTS_A_FILE]]
        files[f"batch-{number}.json"] = [canonical_json({**about, "features": found})]
    skipped = (~alive).nonzero()[0].tolist()
    files["skipped_indexes.json"] = [
        canonical_json({**about, "layer": str(about["layer"]), "log_sparsity": 1, "skipped_indexes": skipped})
    ]
    return exchange.write_folder(out, files)


def _feature(features: Features, latent: Latent) -> dict[str, Any]:
    record, seq_len = features.record, features.run.key["sequences"]["seq_len"]
    corpus = features.run.key["corpus"]
    middles = [round((low + high) / 2, 3) for low, high in zip(latent.edges, latent.edges[1:], strict=False)]
    return {
        **{name: [] for name in EMPTY},
        "feature_index": latent.index,
        "n_prompts_total": -(-record.rows // seq_len), "n_tokens_in_prompt": seq_len,
        "dataset": corpus.get("dataset") or corpus.get("digest") or "",
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_values": middles, "freq_hist_data_bar_heights": latent.counts,
        "correlated_features_indices": [i for i, _ in latent.coactive],
        "pos_str": [text for text, _ in latent.promoted], "pos_values": [round(v, 3) for _, v in latent.promoted],
        "neg_str": [text for text, _ in latent.suppressed], "neg_values": [round(v, 3) for _, v in latent.suppressed],
        "activations": [
            *(_activation(context, -1, latent.maximum, -1) for context in latent.strongest),
            *(
                _activation(context, group[-1].value, group[0].value, 1 / len(bins))
                for bins in [[g for g in latent.by_quantile(5, 6) if g]] for group in bins for context in group
            ),
        ],
    }  # fmt: skip


def _activation(context: Context, low: float, high: float, share: float) -> dict[str, Any]:
    """Return one context: its tokens, the activation on each, and the group it is shown in; -1 is the group of the largest."""
    return {
        "bin_min": round(low, 3), "bin_max": round(high, 3), "bin_contains": share,
        "tokens": context.tokens, "values": [round(value, 3) for value in context.activations],
    }  # fmt: skip
