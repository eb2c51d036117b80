"""What latents write: the logits that a decoder direction raises and lowers, through the model's last norm and unembedding.

Source: the logit lens (nostalgebraist 2020) applied to directions, as in SAEDashboard and Neuronpedia. Layers between the
hook point and the end are skipped, so this tells most about late layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actstore.errors import FormatError, UsageError
from trainer.kernels import cpu

TOKENS_AT_ONCE = 16_384  # rows of the unembedding in memory
NORMS = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_?norm)\.(weight|bias)$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
Effects = tuple[Int[Tensor, "n_latents count"], Float[Tensor, "n_latents count"]]


def open_model(model: str, key: dict[str, Any]) -> tuple[Path, str]:
    """Return the folder of a store's model, and the name or digest it is recorded under; loads no weights.

    Args:
        model: folder or hub id.
        key: the store's key, as JSON values.

    Raises: UsageError: no such model, or not the one that the store is of.
    """
    from actstore.backends._folder import WEIGHT_FILES, digest_of, open_folder

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
def logit_effects(directions: Float[Tensor, "n_latents d_model"], folder: Path, count: int) -> tuple[Effects, Effects]:
    """Return the tokens that each direction promotes and suppresses most: two pairs (token ids, logits), strongest first.

    Formula: logits = W_U (g ∘ d), less their mean over the vocabulary, which a softmax does not see; g is the weight of the
    last norm, whose division by the row's own length is left out; before a LayerNorm d is less its own mean.

    Args:
        directions: decoder rows.
        folder: the model's, in which config.json and *.safetensors lie.
        count: tokens of each.

    Raises: FormatError: the model's last norm or unembedding is not found, or of another width.
    """
    from safetensors import safe_open

    from actstore.backends._folder import named, read_config
    from actstore.weights import HEAD, LAYER

    with named(folder, "the weights cannot be read"):
        places: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                places |= {name: path for name in file.keys() if not LAYER.search(name)}  # noqa: SIM118 - not a dict
        heads = [n for n in places if HEAD.match(n) and n.endswith("weight")] or [n for n in places if EMBEDDING.search(n)]
        norms = {match[1]: name for name in places if (match := NORMS.search(name))}
        if not heads or "weight" not in norms:
            raise FormatError("the model's last norm or its unembedding is not found", str(folder), "leave --model out")
        with safe_open(places[norms["weight"]], "pt") as file:
            gain = file.get_tensor(norms["weight"]).float()
        if str(read_config(folder).get("model_type", "")).startswith("gemma"):
            gain = gain + 1  # Gemma's norms keep the weight less 1
        if "bias" in norms:
            directions = directions - directions.mean(1, keepdim=True)
        with safe_open(places[heads[0]], "pt") as file:
            unembedding = file.get_slice(heads[0])
            vocabulary, width = unembedding.get_shape()
            if directions.shape[1] != width or gain.shape != (width,):
                raise FormatError(f"the model's last norm has width {width}, the SAE's output {directions.shape[1]}", str(folder))
            parts = [(at, slice(at, min(vocabulary, at + TOKENS_AT_ONCE))) for at in range(0, vocabulary, TOKENS_AT_ONCE)]
            mean = sum(unembedding[part].double().sum(0) for _, part in parts) / vocabulary
            scaled = directions * gain
            found: list[list[Tensor]] = [[], [], [], []]
            for first, part in parts:
                rows = (unembedding[part].double() - mean).float()
                for i, signed in enumerate((scaled, -scaled)):
                    ids, logits = cpu.topk(signed.contiguous(), rows, torch.zeros(len(rows)), min(count, len(rows)))
                    found[2 * i].append(ids + first)
                    found[2 * i + 1].append(logits)
    promoted, suppressed = (_best(found[i], found[i + 1], count) for i in (0, 2))
    return promoted, (suppressed[0], -suppressed[1])


def _best(ids: list[Tensor], logits: list[Tensor], count: int) -> Effects:
    """Return the best of the best of parts of the vocabulary."""
    best = torch.cat(logits, 1).topk(count, dim=1)
    return torch.cat(ids, 1).gather(1, best.indices).int(), best.values
