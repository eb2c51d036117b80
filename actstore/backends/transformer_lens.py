"""TransformerLens's TransformerBridge as a backend: any Hugging Face model it supports, every hook point it lists.

Attention is eager, as TransformerBridge forces it to be.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.backends import nearest_hook
from actstore.backends._folder import FolderModel, named, open_folder, quiet
from actstore.backends._rows import Kept, LastHookPointReachedError, out_of_memory_named
from actstore.backends._taps import Replace
from actstore.errors import UsageError

LAYER = re.compile(r"blocks\.(\d+)\.")
_PROBE_VOCABULARY = 64
_PROBE_SHAPE = (2, 11)  # batch and seq_len of the probe: no width of a real model is 11


class TransformerLensBackend(FolderModel):
    """A model folder run by TransformerBridge; see FolderModel for the arguments."""

    name: Literal["transformer_lens"] = "transformer_lens"
    attention: Literal["eager"] = "eager"
    _bridge: Any = None  # loaded by `prepare`
    _loaded = 0  # layers of it

    @cached_property
    def _probe(self) -> dict[str, tuple[int, ...]]:
        """Shape of the tensor at every hook point of a one-layer model of random weights and the real widths."""
        import torch
        import transformers
        from transformer_lens.model_bridge import TransformerBridge

        config = transformers.AutoConfig.from_pretrained(self.folder)
        config.num_hidden_layers, config.vocab_size = 1, _PROBE_VOCABULARY
        config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
        shapes: dict[str, tuple[int, ...]] = {}
        with quiet(), named(self.folder, "the architecture is not supported"), torch.inference_mode():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.compute_dtype)).eval()
            bridge = TransformerBridge.boot_transformers(
                str(self.folder), hf_model=model, tokenizer=self.tokenizer, dtype=getattr(torch, self.compute_dtype)
            )
            for name, point in bridge.hook_dict.items():
                point.add_hook(lambda x, hook, name=name: shapes.setdefault(name, tuple(getattr(x, "shape", ()))) and None)
            bridge(torch.zeros(_PROBE_SHAPE, dtype=torch.long), return_type=None)
        return shapes

    def widths(self, hooks: list[str]) -> list[int]:
        """Return d_model of each hook point, from a one-layer probe; see Backend.widths."""
        widths = []
        for hook in hooks:
            layer = LAYER.match(hook)
            number = int(layer[1]) if layer else 0
            shape = self._probe.get(LAYER.sub("blocks.0.", hook)) if number < self.n_layers else None
            if shape is None:
                at = f"blocks.{min(number, self.n_layers - 1)}."
                raise nearest_hook(hook, [LAYER.sub(at, name) for name in self._probe])
            if shape[:2] != _PROBE_SHAPE or len(shape) < 3:
                raise UsageError(
                    f"hook point {hook!r} has shape {shape} for {_PROBE_SHAPE[0]} sequences of {_PROBE_SHAPE[1]} tokens: "
                    "not one vector a token",
                    do="ask for a hook point such as blocks.0.hook_resid_pre or blocks.0.attn.hook_z",
                )
            widths.append(int(np.prod(shape[2:])))
        return widths

    def layers_for(self, hooks: list[str]) -> int:
        """Return how many layers the hook points need."""
        layers = [int(m[1]) for hook in hooks if (m := LAYER.match(hook))]
        return max(layers) + 1 if len(layers) == len(hooks) else self.n_layers

    def _load(self, wanted: int) -> Any:
        """Load the model's first layers."""
        import torch
        from transformer_lens.model_bridge import TransformerBridge

        self.refuse_missing(wanted)
        field = self.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        overrides = {field: wanted} if wanted < self.n_layers and hasattr(self.config, field) else None
        with named(self.folder, "the weights cannot be loaded"), out_of_memory_named(self.device), quiet():
            bridge = TransformerBridge.boot_transformers(
                str(self.folder),
                device=self.device,
                dtype=getattr(torch, self.compute_dtype),
                tokenizer=self.tokenizer,
                hf_config_overrides=overrides,
            )
            bridge.eval()
        bridge.original_model.config.use_cache = False  # keys and values of past tokens are never asked for again
        return bridge

    def prepare(self, hooks: list[str]) -> None:
        """Load the model; see Backend.prepare."""
        layers = self.layers_for(hooks)
        if self._loaded < layers:
            self._bridge = None
            self._bridge, self._loaded = self._load(layers), layers

    def logits(self, tokens: Any, read: str, write: str, replace: Sequence[Replace]) -> Iterator[Any]:
        """Yield the whole model's logits with the value at a hook point replaced, in one way after the other.

        Args:
            tokens: (batch, seq_len) int64 tensor.
            read, write: hook points that were captured, `read` before `write` or the same.
            replace: each given the rows at `read` and at `write`, (batch, seq_len, d_model), returns those to go on with.

        Yields: (batch, seq_len, vocabulary) in the compute dtype, on the model's device.
        Raises: OutOfMemoryError. UsageError: a model that predicts no next token.
        """
        import torch

        self.prepare(["unembed"])  # no hook point of a block: all layers
        if getattr(self._bridge.cfg, "attention_dir", "causal") != "causal":
            raise UsageError("the model does not predict the next token: it has no loss to measure", str(self.folder))
        seen: dict[str, Any] = {}

        def keep(x: Any, hook: Any) -> None:
            seen["read"] = x.flatten(2)

        for new in replace:

            def change(x: Any, hook: Any, new: Replace = new) -> Any:
                return new(seen["read"], x.flatten(2)).to(x.dtype).reshape(x.shape)

            with out_of_memory_named(self.device), torch.inference_mode(), quiet():
                hooks = [(read, keep), (write, change)]
                found = self._bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks, return_type="logits")
            yield found

    def launch(
        self, tokens: npt.NDArray[np.int64], lengths: list[int], hooks: list[str], dtypes: list[str]
    ) -> Callable[[], list[npt.NDArray[Any]]]:
        """Run the model up to the last hook point; see Backend.launch."""
        import torch

        self.prepare(hooks)
        ids = torch.from_numpy(tokens).to(self.device)
        kept = Kept(hooks, lengths)
        fwd_hooks = [(name, lambda x, hook, name=name: kept.keep(name, x)) for name in hooks]
        options: dict[str, Any] = {}
        if getattr(self._bridge.cfg, "attention_dir", "causal") != "causal":
            real = torch.arange(ids.shape[1])[None, :] < torch.tensor(lengths)[:, None]
            options["attention_mask"] = real.to(ids.device).long()
        with out_of_memory_named(self.device), torch.inference_mode(), quiet():
            with contextlib.suppress(LastHookPointReachedError):
                self._bridge.run_with_hooks(ids, fwd_hooks=fwd_hooks, return_type=None, **options)
            return kept.delivered(dtypes)


def load(model: str, revision: str | None, compute_dtype: str, device: str) -> TransformerLensBackend:
    """Open a local folder, or a hub id, without loading weights. Raises: as `open_folder`."""
    return TransformerLensBackend(*open_folder(model, revision), compute_dtype, device)
