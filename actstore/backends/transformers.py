"""The fast engine: a plain transformers model with fused attention (sdpa), for the usual hook points of common models.

Only the layers up to the last hook point are loaded, the forward pass ends there, and no logits are computed. Hook
points carry TransformerLens's names and meaning: each equals what TransformerBridge gives to within float rounding
(in float32 on a CPU, the largest difference is below 1e-5 of the hook point's largest value; see
tests/actstore/test_transformers.py). Adding a family of models is adding a line to `FAMILIES`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.backends import nearest_hook
from actstore.backends._folder import FolderModel, named, open_folder, quiet, read_config
from actstore.backends._rows import Kept, LastHookPointReachedError, out_of_memory_named, to_device
from actstore.backends._taps import Replace, Tap, hooked, replaced_logits
from actstore.errors import UsageError
from actstore.key import Attention, ModelIdentity

LAYER = re.compile(r"blocks\.(\d+)\.(.*)")
_MEMORY_SHARE = 0.8  # of one GPU, for weights; beyond that they are spread over all of them


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family of models keeps its parts, as module names; those of a layer are relative to it.

    Args:
        embed, layers, norm: of the model: token embedding, list of layers, last norm.
        attn, z_to: a layer's attention, and its output projection.
        mlp, post_to: a layer's MLP, and its output projection.
        ln1, ln2: the norms before attention and MLP; no ln2 where both read the same residual stream.
        attn_out, mlp_out: what is added to the residual stream, where a norm comes in between.
        attention: how attention is computed.
    """

    embed: str
    layers: str
    norm: str
    attn: str
    z_to: str
    mlp: str
    post_to: str
    ln1: str
    ln2: str
    attn_out: str = ""
    mlp_out: str = ""
    attention: Attention = "sdpa"


_LLAMA = Family(
    embed="embed_tokens", layers="layers", norm="norm", attn="self_attn", z_to="self_attn.o_proj", mlp="mlp",
    post_to="mlp.down_proj", ln1="input_layernorm", ln2="post_attention_layernorm",
)  # fmt: skip
FAMILIES = {
    "gpt2": Family(
        embed="wte", layers="h", norm="ln_f", attn="attn", z_to="attn.c_proj", mlp="mlp", post_to="mlp.c_proj",
        ln1="ln_1", ln2="ln_2",
    ),
    "gpt_neox": Family(
        embed="embed_in", layers="layers", norm="final_layer_norm", attn="attention", z_to="attention.dense", mlp="mlp",
        post_to="mlp.dense_4h_to_h", ln1="input_layernorm", ln2="post_attention_layernorm",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    # Attention scores are capped (softcapping), which sdpa cannot do.
    "gemma2": Family(
        embed="embed_tokens", layers="layers", norm="norm", attn="self_attn", z_to="self_attn.o_proj", mlp="mlp",
        post_to="mlp.down_proj", ln1="input_layernorm", ln2="pre_feedforward_layernorm",
        attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", attention="eager",
    ),
}  # fmt: skip


def _taps(family: Family, n_layers: int, parallel: bool) -> dict[str, Tap]:
    """Return every hook point of a model of this family."""
    found = {"hook_embed": Tap(family.embed, "out"), "ln_final.hook_normalized": Tap(family.norm, "normalized")}
    for i in range(n_layers):
        layer, block = f"{family.layers}.{i}", f"blocks.{i}"
        found |= {
            f"{block}.hook_resid_pre": Tap(f"{family.layers}.{i - 1}", "out") if i else Tap(layer, "in"),
            f"{block}.hook_resid_post": Tap(layer, "out"),
            f"{block}.hook_attn_out": Tap(f"{layer}.{family.attn_out or family.attn}", "out"),
            f"{block}.hook_mlp_out": Tap(f"{layer}.{family.mlp_out or family.mlp}", "out"),
            f"{block}.attn.hook_z": Tap(f"{layer}.{family.z_to}", "in"),
            f"{block}.mlp.hook_post": Tap(f"{layer}.{family.post_to}", "in"),
            f"{block}.ln1.hook_normalized": Tap(f"{layer}.{family.ln1}", "normalized"),
            f"{block}.ln2.hook_normalized": Tap(f"{layer}.{family.ln2}", "normalized"),
        }
        if not parallel:
            found[f"{block}.hook_resid_mid"] = Tap(f"{layer}.{family.ln2}", "in")
    return found


class TransformersBackend(FolderModel):
    """A model folder run by transformers itself; see FolderModel for the arguments."""

    name: Literal["transformers"] = "transformers"
    loads_head = False

    def __init__(self, folder: Path, identity: ModelIdentity, compute_dtype: str, device: str) -> None:
        super().__init__(folder, identity, compute_dtype, device)
        family = FAMILIES.get(self.config.model_type)
        if family is None:
            raise UsageError(
                f"the fast engine does not know models of type {self.config.model_type!r}",
                do=f"use --backend transformer_lens; it knows {', '.join(FAMILIES)}",
            )
        self.attention = family.attention
        self._taps = _taps(family, self.n_layers, bool(getattr(self.config, "use_parallel_residual", False)))
        self._model: Any = None  # loaded by `prepare`
        self._causal: Any = None  # with its head: loaded by `logits`
        self._loaded = 0  # layers of it

    @cached_property
    def _outline(self) -> Any:
        """The first layer of the model without any memory for its weights: shapes only."""
        import torch
        import transformers

        with quiet(), named(self.folder, "the architecture is not supported"), torch.device("meta"):
            return transformers.AutoModel.from_config(self.config_of(1))

    def widths(self, hooks: list[str]) -> list[int]:
        """Return d_model of each hook point, from shapes alone; see Backend.widths."""
        widths = []
        for hook in hooks:
            if hook not in self._taps:
                raise nearest_hook(hook, list(self._taps))
            width = int(self.config.hidden_size)
            if hook.endswith(("attn.hook_z", "mlp.hook_post")):
                first = self._taps[LAYER.sub(r"blocks.0.\2", hook)]
                weight = self._outline.get_submodule(first.module).weight
                width = int(weight.shape[0] if self.config.model_type == "gpt2" else weight.shape[1])  # Conv1D is transposed
            widths.append(width)
        return widths

    def layers_for(self, hooks: list[str]) -> int:
        """Return how many layers the hook points need, one at least."""
        needed = 1
        for hook in hooks:
            layer = LAYER.match(hook)
            if layer is not None:
                needed = max(needed, int(layer[1]) + (layer[2] != "hook_resid_pre"))
            elif hook != "hook_embed":
                needed = self.n_layers
        return needed

    def prepare(self, hooks: list[str]) -> None:
        """Load the model up to the last layer that a hook point needs; see Backend.prepare."""
        layers = self.layers_for(hooks)
        if self._loaded >= layers:
            return
        import transformers

        self._model = None
        self._model, self._loaded = self._pretrained(transformers.AutoModel, layers, hooks), layers

    def _pretrained(self, kind: Any, layers: int, hooks: list[str]) -> Any:
        """Load the first layers of the model as one of transformers' classes, onto the device."""
        import torch

        self.refuse_missing(layers)
        config = self.config_of(layers)
        config.pad_token_id = None  # padding comes last and needs no mask: GPT-2 looks for it in every batch otherwise
        with named(self.folder, "the weights cannot be loaded"), out_of_memory_named(self.device), quiet():
            model = kind.from_pretrained(
                self.folder, config=config, dtype=getattr(torch, self.compute_dtype),
                attn_implementation=self.attention, device_map=self._device_map(hooks), use_safetensors=True,
            )  # fmt: skip
            model.config.use_cache = False  # keys and values of past tokens are never asked for again
            return model.eval() if self.device.startswith("cuda") else model.to(self.device).eval()

    def _device_map(self, hooks: list[str]) -> Any:
        """Return where transformers is to put the weights: on one GPU, or on all when they are too large for one."""
        import torch

        if not self.device.startswith("cuda"):
            return None
        alone = torch.cuda.get_device_properties(0).total_memory * _MEMORY_SHARE >= self.weight_bytes(hooks)
        return {"": self.device} if alone or torch.cuda.device_count() == 1 else "auto"

    def launch(
        self, tokens: npt.NDArray[np.int64], lengths: list[int], hooks: list[str], dtypes: list[str]
    ) -> Callable[[], list[npt.NDArray[Any]]]:
        """Start the model on a batch; see Backend.launch. Padding needs no mask: attention is causal, and it comes last."""
        import torch

        self.prepare(hooks)
        kept = Kept(hooks, lengths)
        with out_of_memory_named(self.device), torch.inference_mode(), contextlib.ExitStack() as stack:
            for name in hooks:
                stack.callback(hooked(self._model, self._taps[name], partial(kept.keep, name)).remove)
            ids = to_device(torch.from_numpy(tokens), self._model.get_input_embeddings().weight.device)
            with contextlib.suppress(LastHookPointReachedError):
                self._model(input_ids=ids, use_cache=False)
            return kept.delivered(dtypes)

    def logits(self, tokens: Any, read: str, write: str, replace: Sequence[Replace]) -> Iterator[Any]:
        """Yield the whole model's logits under each replacement, from one forward pass; see TransformerLensBackend.logits."""
        import torch
        import transformers

        if self._causal is None:
            self._causal = self._pretrained(transformers.AutoModelForCausalLM, self.n_layers, ["ln_final.hook_normalized"])
        tap = self._taps[write]
        maskless = self.attention == "sdpa" and not getattr(self.config, "sliding_window", None)  # a mask has the input's rows
        inside = re.match(r"(.*?\.\d+)(\.|$)", tap.module) if maskless else None
        layer = Tap(inside[1], "in") if inside else None
        with out_of_memory_named(self.device), torch.inference_mode():
            yield from replaced_logits(self._causal, tokens.to(self.device), layer, self._taps[read], tap, replace)


def serves(model: str, revision: str | None, hooks: tuple[str, ...]) -> bool:
    """Return whether the fast engine knows this model and all of these hook points. Raises: as `open_folder`."""
    folder, _ = open_folder(model, revision)
    config = read_config(folder)
    family = FAMILIES.get(str(config.get("model_type")))
    layers = max((int(m[1]) + 1 for hook in hooks if (m := LAYER.match(hook))), default=1)
    if family is None or layers > 1 << 16:
        return False
    return set(hooks) <= set(_taps(family, layers, bool(config.get("use_parallel_residual", family is FAMILIES["gpt_neox"]))))


def load(model: str, revision: str | None, compute_dtype: str, device: str) -> TransformersBackend:
    """Open a local folder, or a hub id, without loading weights.

    Raises: as `open_folder`; UsageError: a model of another family.
    """
    return TransformersBackend(*open_folder(model, revision), compute_dtype, device)
