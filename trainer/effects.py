"""What latents write: the logits that a decoder direction raises and lowers, through the model's last norm and unembedding.

Source: the logit lens (nostalgebraist 2020) applied to directions, as in SAEDashboard and Neuronpedia. Layers between the
hook point and the end are skipped, so this tells most about late layers.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from actstore.backends._folder import WEIGHT_FILES, digest_of, named, open_folder, read_config
from actstore.errors import FormatError, UsageError
from actstore.weights import HEAD, LAYER
from trainer.kernels import cpu

TOKENS_AT_ONCE = 16_384  # rows of the unembedding in memory
NORMS = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_?norm)\.(weight|bias)$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
SIGNS = {"promoted": 1.0, "suppressed": -1.0}


def open_model(model: str, key: dict[str, Any]) -> tuple[Path, str]:
    """Return the folder of a store's model, and the name or digest it is recorded under; loads no weights.

    Args:
        model: folder or hub id.
        key: the store's key, as JSON values.

    Raises: UsageError: no such model, or not the one that the store is of.
    """
    wanted = key["model"]
    folder, identity = open_folder(model, wanted.get("revision"))
    found = identity.name or digest_of([f for pattern in WEIGHT_FILES for f in folder.glob(pattern)])
    if found != (wanted.get("name") or wanted.get("digest")):
        raise UsageError(
            "this is not the model that the store was captured from", f"{model}: {found}; the store's: {wanted}",
            "name the model that `actstore info` shows, or leave --model out",
        )  # fmt: skip
    return folder, found


@torch.no_grad()
def logit_effects(directions: Float[Tensor, "n_latents d_model"], folder: Path, count: int) -> dict[str, npt.NDArray[Any]]:
    """Return the tokens that each direction promotes and suppresses most, strongest first.

    Formula: logits = W_U (g ∘ d), less their mean over the vocabulary, which a softmax does not see; g is the weight of the
    last norm, whose division by the row's own length is left out; before a LayerNorm d is less its own mean.

    Args:
        directions: decoder rows.
        folder: the model's, in which config.json and *.safetensors lie.
        count: tokens of each.

    Returns: `promoted_tokens`, `suppressed_tokens` (n_latents, count) int32; `promoted_logits`, `suppressed_logits` float32.
    Raises: FormatError: the model's last norm or unembedding is not found, or of another width.
    """
    with named(folder, "the weights cannot be read"), contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        places = {name: file for file in files for name in file.keys() if not LAYER.search(name)}  # noqa: SIM118 - not a dict
        heads = [n for n in places if HEAD.match(n) and n.endswith("weight")] or [n for n in places if EMBEDDING.search(n)]
        norms = {match[1]: places[name].get_tensor(name).float() for name in places if (match := NORMS.search(name))}
        unembedding: Any = places[heads[0]].get_slice(heads[0]) if heads else None
        vocabulary, width = unembedding.get_shape() if heads else (0, 0)
        if "weight" not in norms or norms["weight"].shape != (width,) or directions.shape[1] != width:
            raise FormatError(
                f"no last norm and unembedding of width {directions.shape[1]} in the model", str(folder), "omit --model"
            )
        gain = norms["weight"] + float(str(read_config(folder).get("model_type", "")).startswith("gemma"))  # Gemma's: less 1
        scaled = (directions - directions.mean(1, keepdim=True) if "bias" in norms else directions) * gain
        parts = [(at, slice(at, min(vocabulary, at + TOKENS_AT_ONCE))) for at in range(0, vocabulary, TOKENS_AT_ONCE)]
        mean = sum(unembedding[part].double().sum(0) for _, part in parts) / vocabulary
        best = {kind: (torch.empty(len(scaled), 0, dtype=torch.int64), torch.empty(len(scaled), 0)) for kind in SIGNS}
        for first, part in parts:
            rows = (unembedding[part].double() - mean).float()
            for kind, (ids, logits) in best.items():
                more = cpu.topk(SIGNS[kind] * scaled, rows, torch.zeros(len(rows)), min(count, len(rows)))
                ids, logits = torch.cat([ids, more[0] + first], 1), torch.cat([logits, more[1]], 1)
                values, at = logits.topk(min(count, logits.shape[1]), dim=1)
                best[kind] = ids.gather(1, at), values
    found = {f"{kind}_tokens": ids.int().numpy() for kind, (ids, _) in best.items()}
    return found | {f"{kind}_logits": SIGNS[kind] * logits.numpy() for kind, (_, logits) in best.items()}
