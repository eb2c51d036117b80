"""SAELens's folder: cfg.json and sae_weights.safetensors, written and read by hand, without importing sae_lens.

Source: sae_lens 6.54.12, `SAE.load_from_disk` and sae_lens/saes/*.py; traps found by loading hand-written folders with it
(../shared/research/saelens.md, section 3): without `metadata.sae_lens_version` >= 6.0.0 all metadata is dropped, `k`
defaults to 100, ReLU follows the top-k, W_enc is (d_in, d_sae), a BatchTopK SAE is loaded as the JumpReLU SAE it is after
training, a transcoder subtracts no centre from its input, and there is none with top-k or a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from actstore.digests import canonical_json
from actstore.errors import FormatError
from trainer import exchange
from trainer.checkpoint import Run
from trainer.exchange import Foreign, Latents, Parts, Width
from trainer.sae import SparseAutoencoder
from trainer.saved import tensor_pieces
from trainer.sources import Sources

SAELENS_VERSION = "6.54.12"  # the release whose format this is
TRAINED_AS = {  # its names of our architectures
    "topk": "topk", "batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka_batchtopk", "jumprelu": "jumprelu",
    "relu_l1": "standard", "p_anneal": "standard", "gated": "gated",
}  # fmt: skip
LOADED_AS = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}
TRANSCODERS = {"standard": "", "jumprelu": "jumprelu_"}  # prefix of "transcoder" or "skip_transcoder"
SAME_NAME = ("batchtopk", "matryoshka_batchtopk")  # what a jumprelu with one threshold may have been trained as


class Metadata(Foreign):
    """What is known of the training; `sae_lens_version` says which format the rest has."""

    sae_lens_version: Annotated[str, Field(pattern=r"^([6-9]|[1-9][0-9]+)\.", max_length=64)]
    training_architecture: Annotated[str, Field(max_length=64)] | None = None
    actstore_k: Latents | None = None


class Config(Foreign):
    """`cfg.json`."""

    architecture: Literal[
        "standard", "topk", "jumprelu", "gated",
        "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
    ]  # fmt: skip
    d_in: Width
    d_sae: Latents
    d_out: Width | None = None
    k: Latents | None = None
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    normalize_activations: Literal["none"] = "none"  # `load_from_disk` would leave any other to the caller
    reshape_activations: Literal["none"] = "none"
    metadata: Metadata


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the folder; the SAE is in the units of the model's activations, so nothing is left to normalise.

    Raises: UsageError: SAELens has no such SAE.
    """
    name = LOADED_AS.get(TRAINED_AS.get(sae.arch, ""), TRAINED_AS.get(sae.arch, ""))
    transcoder = sae.widths.targets is not None
    if not name or exchange.is_crosscoder(sae) or (transcoder and name not in TRANSCODERS):
        raise exchange.refuse(sae, "SAELens")
    if transcoder:
        name = f"{TRANSCODERS[name]}{'skip_' if sae.config.skip else ''}transcoder"
    weights = _weights(sae, name)
    config: dict[str, Any] = {
        "architecture": name, "d_in": sae.widths.d_in, "d_sae": run.config.n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": not transcoder, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": _metadata(run, sae),
    }  # fmt: skip
    if name == "topk":
        config |= {"k": run.config.k, "rescale_acts_by_decoder_norm": False}
    if transcoder:
        config["d_out"] = sae.widths.d_out
    return exchange.write_folder(out, {"sae_weights.safetensors": tensor_pieces(weights), "cfg.json": [canonical_json(config)]})


def _weights(sae: SparseAutoencoder, name: str) -> dict[str, Tensor]:
    found = exchange.without_centre(sae) if name.endswith("transcoder") else exchange.common(sae)
    found["W_enc"] = found["W_enc"].T
    if name.startswith("jumprelu"):
        found["threshold"] = exchange.threshold_of(sae)
    if name == "gated":
        found |= {"b_gate": found.pop("b_enc"), **{key: sae.get_parameter(key).detach() for key in ("b_mag", "r_mag")}}
    return found


def _metadata(run: Run, sae: SparseAutoencoder) -> dict[str, Any]:
    sequences = run.key["sequences"]
    return {
        "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, "training_architecture": TRAINED_AS[sae.arch],
        "model_name": run.model_name, "model_class_name": "TransformerBridge",
        "hook_name": run.key["hook"], "hook_name_out": exchange.target_of(run).get("hook"),
        "hook_head_index": None, "context_size": sequences.get("seq_len"), "prepend_bos": sequences.get("bos"),
        "dataset_path": run.key["corpus"].get("dataset"),
        "model_from_pretrained_kwargs": {"center_writing_weights": False}, **exchange.lineage(run),
    }  # fmt: skip


def import_sae(folder: Path) -> Parts:
    """Read the folder; see `trainer.formats.import_sae`. Raises: FormatError."""
    config, text = exchange.read_config(folder, "cfg.json", Config)
    name = config.architecture
    transcoder, skip = name.endswith("transcoder"), "skip_" in name
    d_in, n, d_out = config.d_in, config.d_sae, config.d_in
    if transcoder:
        if config.d_out is None:
            raise FormatError("cfg.json: field d_out: Field required", str(folder))
        d_out = config.d_out
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, n), "W_dec": (n, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if name == "gated" else ("b_enc",), (n,))
    if name.startswith("jumprelu"):
        shapes["threshold"] = (n,)
    if skip:
        shapes["W_skip"] = (d_out, d_in)
    tensors, data = exchange.read_weights(folder, "sae_weights.safetensors", shapes)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if name == "gated":
        tensors["b_enc"] = tensors.pop("b_gate")
    if not config.apply_b_dec_to_input and not transcoder:
        tensors = _centred(tensors)
    if name == "topk":
        if config.k is None:  # SAELens would take 100
            raise FormatError("cfg.json: field k: Field required", str(folder))
        if config.rescale_acts_by_decoder_norm:  # ranked and valued by activation times norm: the norm goes into the code
            norms = tensors["W_dec"].norm(dim=1)
            tensors |= {"W_enc": tensors["W_enc"] * norms[:, None], "b_enc": tensors["b_enc"] * norms}
            tensors["W_dec"] = tensors["W_dec"] / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    k = config.k if name == "topk" else config.metadata.actstore_k
    return Parts(_arch(name, config.metadata), k or 1, tensors, (text, data), transcoder)


def _centred(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    moved = exchange.with_centre(tensors)
    if "b_mag" in tensors:
        by = tensors["r_mag"].exp() * (moved["b_enc"] - tensors["b_enc"])
        moved["b_mag"] = tensors["b_mag"] + by
    return moved


def _arch(name: str, metadata: Metadata) -> str:
    """Return our architecture of the same code."""
    if name.startswith("jumprelu"):
        trained_as = metadata.training_architecture
        return trained_as if trained_as in SAME_NAME else "jumprelu"
    return name if name in ("topk", "gated") else "relu_l1"
