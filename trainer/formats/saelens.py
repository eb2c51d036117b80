"""SAELens's folder: cfg.json and sae_weights.safetensors, written by hand, without importing sae_lens.

Source: sae_lens 6.54.12, `SAE.load_from_disk`; traps found by loading hand-written folders with it
(../shared/research/saelens.md, section 3): without `metadata.sae_lens_version` >= 6.0.0 all metadata is dropped, `k`
defaults to 100, ReLU follows the top-k, W_enc is (d_in, d_sae).
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save as save_tensors

from actstore import durable
from actstore.digests import canonical_json
from actstore.errors import UsageError
from trainer.checkpoint import Run
from trainer.sae import SparseAutoencoder

SAELENS_VERSION = "6.54.12"  # the release whose format this is


def export_sae(run: Run, sae: SparseAutoencoder, out: Path) -> list[Path]:
    """Write the folder; the SAE is in the units of the model's activations, so nothing is left to normalise.

    Raises: UsageError: SAELens has no such architecture.
    """
    if sae.arch != "topk":
        raise UsageError(f"architecture {sae.arch!r} has no SAELens form here", do="export a topk run")
    sequences = run.key.get("sequences", {})
    config = {
        "architecture": "topk",
        "d_in": run.d_model,
        "d_sae": run.config.n_latents,
        "k": run.config.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": run.key.get("model", {}).get("name") or run.model,
            "model_class_name": "TransformerBridge",
            "hook_name": run.key.get("hook"),
            "hook_head_index": None,
            "context_size": sequences.get("seq_len"),
            "prepend_bos": sequences.get("bos"),
            "dataset_path": run.key.get("corpus", {}).get("dataset"),
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "actstore_run": run.digest,
            "actstore_store": run.store,
            "actstore_content_digest": run.content_digest,
        },
    }
    weights = {
        "W_enc": sae.W_enc.detach().T.contiguous(),
        "b_enc": sae.b_enc.detach(),
        "W_dec": sae.W_dec.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    durable.make_dir(out)
    durable.write_new(out, "sae_weights.safetensors", [save_tensors(weights)])
    durable.write_new(out, "cfg.json", [canonical_json(config)])
    durable.remove_tree(out / "tmp")
    return [out / "cfg.json", out / "sae_weights.safetensors"]
