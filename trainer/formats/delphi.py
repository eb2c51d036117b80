"""delphi's latent cache (EleutherAI): which latents are active where, and the tokens; written only.

DIR/latents/<hook point>/<first>_<last>.safetensors, each with `locations` (pairs, 3): sequence, position, latent minus
<first>, uint16 where they fit, else uint32; `activations` (pairs,) float16; `tokens` (sequences, seq_len) int64; and
config.json. Source: delphi/latents/cache.py (`save_splits`, `save_config`) and delphi/latents/loader.py, 2025. An
activation beyond float16 makes the file float32, which its loader takes as well: half of it would be infinity.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save as save_arrays

from actstore.digests import canonical_json
from actstore.errors import UsageError
from trainer.checkpoint import Run
from trainer.exchange import lineage, write_folder
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources

N_SPLITS = 5  # delphi's default
LEAST = 1e-5  # delphi's: what is below counts as not active
MAX_PAIRS = 1 << 28  # 3.5 GB: a larger cache is cut off after a whole sequence
ROWS_AT_ONCE = 4096
Arrays = dict[str, npt.NDArray[Any]]


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the cache of the run's own store, at most MAX_PAIRS activations of it.

    Raises: UsageError: the sequences are of several lengths, for which the format has no form.
    """
    sources = open_sources()
    seq_len = sources.first.key.sequences.seq_len
    if sources.first.key.sequences.packing != "pack" or sources.rows < seq_len:
        raise UsageError("delphi's tokens are sequences of one length", do="capture with --packing pack")
    locations, activations, rows = _pairs(sae, sources, seq_len)
    tokens = sources.first.read("tokens", 0, rows).astype(np.int64).reshape(-1, seq_len)
    folder = f"latents/{safe_name(str(run.key.get('hook')))}"
    files: dict[str, list[bytes]] = {}
    edges = np.linspace(0, run.config.n_latents, min(N_SPLITS, run.config.n_latents) + 1).astype(np.int64)
    for first, last in zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True):
        mine = (locations[:, 2] >= first) & (locations[:, 2] <= last)
        arrays = {**_split(locations[mine], activations[mine], first), "tokens": tokens}
        files[f"{folder}/{first}_{last}.safetensors"] = [save_arrays(arrays)]
    files[f"{folder}/config.json"] = [canonical_json(_config(run, len(tokens), seq_len))]
    return write_folder(out, files)


def safe_name(name: str) -> str:
    """Return a hook point's name as the name of a folder: it may come from a stranger's run.

    Example:
        >>> safe_name("blocks.3.hook_resid_pre"), safe_name("../../etc")
        ('blocks.3.hook_resid_pre', '_.._etc')
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", name[:200]).lstrip(".") or "_"


@torch.no_grad()
def _pairs(sae: SparseAutoencoder, sources: Sources, seq_len: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
    """Return (sequence, position, latent) of each activation, its value, and how many rows were looked at."""
    places, values, rows, found = [], [], sources.rows // seq_len * seq_len, 0
    step = max(1, ROWS_AT_ONCE // seq_len) * seq_len
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        code = sae.encode_sparse(sources.take(np.arange(start, stop)).x)
        active = code.values.abs() > LEAST
        row = code.rows()[active] + start
        places.append(torch.stack([row // seq_len, row % seq_len, code.indices[active]], dim=1).to(torch.int32).numpy())
        values.append(code.values[active].numpy())
        found += len(row)
        if found > MAX_PAIRS:
            rows = stop
            break
    return np.concatenate(places), np.concatenate(values), rows


def _split(locations: npt.NDArray[Any], activations: npt.NDArray[Any], first: int) -> Arrays:
    shifted = locations - np.array([0, 0, first], np.int32)
    small = shifted.max(initial=0) < 1 << 16
    half = np.abs(activations).max(initial=0) <= np.finfo(np.float16).max
    return {
        "locations": np.ascontiguousarray(shifted.astype(np.uint16 if small else np.uint32)),
        "activations": activations.astype(np.float16 if half else np.float32),
    }


def _config(run: Run, n_sequences: int, seq_len: int) -> dict[str, Any]:
    corpus = run.key["corpus"]
    return {
        "dataset_repo": corpus.get("dataset") or "", "dataset_split": corpus.get("split") or "",
        "dataset_name": corpus.get("config") or "", "dataset_column": run.key.get("text_field"),
        "batch_size": 32, "ctx_len": seq_len, "n_tokens": n_sequences * seq_len, "n_splits": N_SPLITS,
        "model_name": run.model_name, **lineage(run),
    }  # fmt: skip
