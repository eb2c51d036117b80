"""TransformerLens's TransformerBridge as a backend: any Hugging Face model it supports, every hook point it lists.

Weights are loaded as published, without folding or centring, so a
residual stream equals the Hugging Face hidden state. Attention is eager, as TransformerBridge forces it to be.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from actstore.backends import Vocabulary, nearest_hook
from actstore.backends._folder import TOKENIZER_FILES, WEIGHT_FILES, digest_of, named, open_folder, quiet, to_numpy
from actstore.errors import UsageError
from actstore.key import ComputeDtype, ModelIdentity
from actstore.weights import elements_up_to

LAYER = re.compile(r"blocks\.(\d+)\.")
_PROBE_VOCABULARY = 64
_PROBE_SHAPE = (2, 11)  # batch and seq_len of the probe: no width of a real model is 11


class _LastHookPointReachedError(Exception):
    """Raised by our own hook to end the forward pass; nothing after the last hook point is computed."""


class TransformerLensBackend:
    """A model folder (local, or a hub snapshot) run by TransformerBridge.

    Args:
        folder: holds config.json, *.safetensors and the tokenizer's files.
        identity: what the key says of the weights.
        compute_dtype: "auto" or a dtype's name.
        device: "auto", "cpu", "cuda" or "mps".
    """

    name: Literal["transformer_lens"] = "transformer_lens"
    attention: Literal["eager"] = "eager"

    def __init__(self, folder: Path, identity: ModelIdentity, compute_dtype: str, device: str) -> None:
        import torch
        import transformers

        self._folder, self._identity = folder, identity
        self._bridge: Any = None  # loaded by the first `activations`
        try:
            with quiet():
                self._config = transformers.AutoConfig.from_pretrained(folder)
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"config or tokenizer cannot be read: {str(error).splitlines()[0][:200]}",
                where=str(folder),
                do="the folder must hold config.json, *.safetensors and tokenizer.json, as save_pretrained writes them",
            ) from error
        self.compute_dtype: ComputeDtype = self._dtype(compute_dtype)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = best if device == "auto" else device
        self.bos: int | None = self._tokenizer.bos_token_id
        self.vocabulary_size = int(self._config.get_text_config().vocab_size)
        context = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = context if isinstance(context, int) else None

    def _dtype(self, wanted: str) -> ComputeDtype:
        own = str(getattr(self._config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = own if wanted == "auto" else wanted
        if dtype not in get_args(ComputeDtype):
            raise UsageError(f"the checkpoint's dtype is {dtype}", do="name one: --compute-dtype float32|float16|bfloat16")
        return cast(ComputeDtype, dtype)

    def fingerprint(self) -> ModelIdentity:
        """Return the hub id and commit, or the digest of the local folder's weights and config."""
        if self._identity.source == "hub":
            return self._identity
        files = [f for pattern in WEIGHT_FILES for f in self._folder.glob(pattern)]
        return ModelIdentity(source="local", digest=digest_of(files))

    def tokenizer_digest(self) -> str:
        """Return one SHA-256 over the tokenizer's files."""
        return digest_of([f for name in TOKENIZER_FILES if (f := self._folder / name).is_file()])

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of each text, without special tokens and without a limit of length."""
        # Not within `quiet`, which turns all threads' stdout round: this runs in the reader's thread.
        encoded = self._tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)
        return cast(list[list[int]], encoded["input_ids"])

    def vocabulary(self) -> Vocabulary:
        """Return the text that each id adds behind another token: behind an anchor, so that leading spaces show."""
        ids = range(self.vocabulary_size)
        anchor = self._tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        prefix = len(self._tokenizer.decode([anchor], clean_up_tokenization_spaces=False))
        texts = self._tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
        special = sorted(i for i in self._tokenizer.all_special_ids if i < self.vocabulary_size)
        return Vocabulary([text[prefix:] for text in texts], special)

    @property
    def _n_layers(self) -> int:
        return int(self._config.get_text_config().num_hidden_layers)

    @cached_property
    def _probe(self) -> dict[str, tuple[int, ...]]:
        """Shape of the tensor at every hook point of a one-layer model of random weights and the real widths."""
        import torch
        import transformers
        from transformer_lens.model_bridge import TransformerBridge

        config = transformers.AutoConfig.from_pretrained(self._folder)
        config.num_hidden_layers, config.vocab_size = 1, _PROBE_VOCABULARY
        config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
        shapes: dict[str, tuple[int, ...]] = {}
        with quiet(), named(self._folder, "the architecture is not supported"), torch.inference_mode():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.compute_dtype)).eval()
            bridge = TransformerBridge.boot_transformers(
                str(self._folder), hf_model=model, tokenizer=self._tokenizer, dtype=getattr(torch, self.compute_dtype)
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
            shape = self._probe.get(LAYER.sub("blocks.0.", hook)) if number < self._n_layers else None
            if shape is None:
                at = f"blocks.{min(number, self._n_layers - 1)}."
                raise nearest_hook(hook, [LAYER.sub(at, name) for name in self._probe])
            if shape[:2] != _PROBE_SHAPE or len(shape) < 3:
                raise UsageError(
                    f"hook point {hook!r} has shape {shape} for {_PROBE_SHAPE[0]} sequences of {_PROBE_SHAPE[1]} tokens: "
                    "not one vector a token",
                    do="ask for a hook point such as blocks.0.hook_resid_pre or blocks.0.attn.hook_z",
                )
            widths.append(int(np.prod(shape[2:])))
        return widths

    def _layers_for(self, hooks: list[str]) -> int:
        """Return how many layers the hook points need."""
        layers = [int(m[1]) for hook in hooks if (m := LAYER.match(hook))]
        return max(layers) + 1 if len(layers) == len(hooks) else self._n_layers

    def weight_bytes(self, hooks: list[str]) -> int:
        """Return the bytes of the tensors to be loaded; see Backend.weight_bytes."""
        with named(self._folder, "the weights cannot be read"):
            return elements_up_to(self._folder, self._layers_for(hooks)) * (4 if self.compute_dtype == "float32" else 2)

    def _load(self, hooks: list[str]) -> Any:
        """Load the model up to the last layer that a hook point needs."""
        import torch
        from transformer_lens.model_bridge import TransformerBridge

        wanted = self._layers_for(hooks)
        field = self._config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        overrides = {field: wanted} if wanted < self._n_layers and hasattr(self._config, field) else None
        with quiet(), named(self._folder, "the weights cannot be loaded"):
            bridge = TransformerBridge.boot_transformers(
                str(self._folder),
                device=self.device,
                dtype=getattr(torch, self.compute_dtype),
                tokenizer=self._tokenizer,
                hf_config_overrides=overrides,
            )
            bridge.eval()
        bridge.original_model.config.use_cache = False  # keys and values of past tokens are never asked for again
        return bridge

    def prepare(self, hooks: list[str]) -> None:
        """Load the model; see Backend.prepare."""
        if self._bridge is None:
            self._bridge = self._load(hooks)

    def activations(self, tokens: npt.NDArray[np.int64], lengths: list[int], hooks: list[str]) -> list[npt.NDArray[Any]]:
        """Run the model up to the last hook point; see Backend.activations."""
        import torch

        self.prepare(hooks)
        ids = torch.from_numpy(tokens).to(self.device)
        real = torch.arange(ids.shape[1])[None, :] < torch.tensor(lengths)[:, None]
        kept: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(x: Any, hook: Any) -> None:
                kept[name] = x.flatten(2)[real.to(x.device)] if len(set(lengths)) > 1 else x.flatten(2).flatten(0, 1)
                if len(kept) == len(hooks):
                    raise _LastHookPointReachedError

            return hook

        causal = getattr(self._bridge.cfg, "attention_dir", "causal") == "causal"
        with torch.inference_mode(), quiet(), contextlib.suppress(_LastHookPointReachedError):
            self._bridge.run_with_hooks(
                ids,
                fwd_hooks=[(name, keep(name)) for name in hooks],
                return_type=None,
                **({} if causal else {"attention_mask": real.to(ids.device).long()}),
            )
        if missing := [name for name in hooks if name not in kept]:
            raise UsageError(f"hook point {missing[0]!r} never fires in this model", do="ask for another one")
        return [to_numpy(kept[name]) for name in hooks]


def load(model: str, revision: str | None, compute_dtype: str, device: str) -> TransformerLensBackend:
    """Open a local folder, or a hub id, without loading weights. Raises: as `open_folder`."""
    return TransformerLensBackend(*open_folder(model, revision), compute_dtype, device)
