"""sparsify's folder (EleutherAI): cfg.json and sae.safetensors.

Source: eai-sparsify 1.3.3, `SparseCoder.load_from_disk` (sparse_coder.py) and `fused_encoder`. It knows top-k only.
Traps: num_latents 0 means expansion_factor x d_in; a transcoder subtracts no centre and has d_out = d_in; the skip
connection reads x itself; the dtype of all is that of the first tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from actstore.digests import canonical_json
from actstore.errors import FormatError
from trainer import exchange
from trainer.checkpoint import Run
from trainer.config import MAX_LATENTS
from trainer.exchange import Foreign, Latents, Parts, Width
from trainer.sae import SparseAutoencoder
from trainer.saved import tensor_pieces
from trainer.sources import Sources

NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}  # the other tensors have our names


class Config(Foreign):
    """`cfg.json`."""

    activation: Literal["topk"] = "topk"  # before it had a name there was no other
    signed: Literal[False] = False  # an option of old versions
    d_in: Width
    num_latents: Annotated[int, Field(ge=0, le=MAX_LATENTS)] = 0
    expansion_factor: Annotated[int, Field(ge=1, le=MAX_LATENTS)] = 32
    k: Latents
    transcode: bool = False
    skip_connection: bool = False


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the folder. Raises: UsageError: sparsify has no such SAE."""
    transcoder = sae.widths.targets is not None
    if sae.arch != "topk" or exchange.is_crosscoder(sae):
        raise exchange.refuse(sae, "sparsify")
    if sae.widths.d_in != sae.widths.d_out:
        raise exchange.refuse(sae, "sparsify", f"it reads width {sae.widths.d_in} and reconstructs width {sae.widths.d_out}")
    tensors = exchange.without_centre(sae) if transcoder else exchange.common(sae)
    config: dict[str, Any] = {
        "activation": "topk", "d_in": sae.widths.d_in, "expansion_factor": 32, "num_latents": run.config.n_latents,
        "normalize_decoder": True, "k": run.config.k, "multi_topk": False, "skip_connection": run.config.skip,
        "transcode": transcoder, "hookpoint": run.key["hook"], **exchange.lineage(run),
    }  # fmt: skip
    weights = {NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    return exchange.write_folder(out, {"sae.safetensors": tensor_pieces(weights), "cfg.json": [canonical_json(config)]})


def import_sae(folder: Path) -> Parts:
    """Read the folder; see `trainer.formats.import_sae`. Raises: FormatError."""
    config, text = exchange.read_config(folder, "cfg.json", Config)
    d, n = config.d_in, config.num_latents or config.expansion_factor * config.d_in
    if n > MAX_LATENTS:
        raise FormatError(f"{n} latents, at most {MAX_LATENTS} are allowed", str(folder / "cfg.json"))
    if config.skip_connection and not config.transcode:
        raise FormatError("an autoencoder with a skip connection: ours have it in transcoders only", str(folder))
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    if config.skip_connection:
        shapes["W_skip"] = (d, d)
    found, data = exchange.read_weights(folder, "sae.safetensors", shapes)
    ours = {theirs: name for name, theirs in NAMES.items()}
    return Parts("topk", config.k, {ours.get(name, name): t for name, t in found.items()}, (text, data), config.transcode)
