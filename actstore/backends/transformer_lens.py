"""TransformerLens's TransformerBridge as a backend: any Hugging Face model it supports, every hook point it lists.

The only module of actstore that imports torch. Weights are loaded as published, without folding or centring, so a
residual stream equals the Hugging Face hidden state. Attention is eager, as TransformerBridge forces it to be.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from actstore.backends import Vocabulary, nearest_hook
from actstore.digests import canonical_json, sha256_bytes, sha256_file
from actstore.errors import FormatError, UsageError
from actstore.key import ComputeDtype, ModelIdentity
from actstore.weights import elements_up_to

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
LAYER = re.compile(r"blocks\.(\d+)\.")
_PROBE_VOCABULARY = 64
_PROBE_SHAPE = (2, 11)  # batch and seq_len of the probe: no width of a real model is 11


class _LastHookPointReachedError(Exception):
    """Raised by our own hook to end the forward pass; nothing after the last hook point is computed."""


def _digest_of(files: list[Path]) -> str:
    return sha256_bytes(canonical_json(sorted((f.name, sha256_file(f)) for f in files)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' prints off stdout, which carries our result, and their progress bars and warnings off stderr."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    """Turn what TransformerLens, transformers or safetensors raise about a model into the error a user sees."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise FormatError(
            f"{what}: {type(error).__name__}: {reason}",
            str(folder),
            "try it with TransformerBridge.boot_transformers(FOLDER) alone",
        ) from error


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
            with _quiet():
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
        return ModelIdentity(source="local", digest=_digest_of(files))

    def tokenizer_digest(self) -> str:
        """Return one SHA-256 over the tokenizer's files."""
        return _digest_of([f for name in TOKENIZER_FILES if (f := self._folder / name).is_file()])

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of each text, without special tokens and without a limit of length."""
        with _quiet():
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
        with _quiet(), _named(self._folder, "the architecture is not supported"), torch.inference_mode():
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
        with _named(self._folder, "the weights cannot be read"):
            return elements_up_to(self._folder, self._layers_for(hooks)) * (4 if self.compute_dtype == "float32" else 2)

    def _load(self, hooks: list[str]) -> Any:
        """Load the model up to the last layer that a hook point needs."""
        import torch
        from transformer_lens.model_bridge import TransformerBridge

        wanted = self._layers_for(hooks)
        field = self._config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        overrides = {field: wanted} if wanted < self._n_layers and hasattr(self._config, field) else None
        with _quiet(), _named(self._folder, "the weights cannot be loaded"):
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

    def activations(self, tokens: npt.NDArray[np.int64], lengths: list[int], hooks: list[str]) -> list[npt.NDArray[Any]]:
        """Run the model up to the last hook point; see Backend.activations."""
        import torch

        if self._bridge is None:
            self._bridge = self._load(hooks)
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
        with torch.inference_mode(), _quiet(), contextlib.suppress(_LastHookPointReachedError):
            self._bridge.run_with_hooks(
                ids,
                fwd_hooks=[(name, keep(name)) for name in hooks],
                return_type=None,
                **({} if causal else {"attention_mask": real.to(ids.device).long()}),
            )
        if missing := [name for name in hooks if name not in kept]:
            raise UsageError(f"hook point {missing[0]!r} never fires in this model", do="ask for another one")
        return [_to_numpy(kept[name]) for name in hooks]


def _to_numpy(x: Any) -> npt.NDArray[Any]:
    """Return a tensor as a numpy array of its own dtype; bfloat16 becomes ml_dtypes.bfloat16, bit for bit."""
    import torch

    if x.dtype is torch.bfloat16:
        import ml_dtypes

        bits: npt.NDArray[Any] = x.contiguous().view(torch.int16).cpu().numpy()
        return bits.view(ml_dtypes.bfloat16)
    return cast(npt.NDArray[Any], x.contiguous().cpu().numpy())


def _snapshot(model: str, revision: str | None) -> tuple[Path, ModelIdentity]:
    """Fetch a hub model's config, safetensors and tokenizer files (or find them cached) and resolve its commit."""
    from huggingface_hub import snapshot_download

    try:
        with _quiet():
            path = snapshot_download(model, revision=revision, allow_patterns=[*WEIGHT_FILES, *TOKENIZER_FILES])
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes when offline
        raise UsageError(
            f"the hub model {model!r} cannot be reached and is not cached ({type(error).__name__})",
            do="give a local folder instead: --model ./FOLDER (config.json, *.safetensors, tokenizer.json)",
        ) from error
    folder = Path(path)
    return folder, ModelIdentity(source="hub", name=model, revision=folder.name)


def load(model: str, revision: str | None, compute_dtype: str, device: str) -> TransformerLensBackend:
    """Open a local folder, or a hub id, without loading weights.

    Raises: UsageError: no such folder, no safetensors in it, or the hub is out of reach. FormatError: broken config.
    """
    folder = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if folder.is_dir():
        identity = ModelIdentity(source="local")
    elif looks_local:
        raise UsageError("the model folder does not exist", str(folder), "give --model an existing folder or a hub id")
    else:
        folder, identity = _snapshot(model, revision)
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            "the model folder holds no *.safetensors",
            str(folder),
            "save it with model.save_pretrained(FOLDER): pickled weights are refused",
        )
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError("config.json is missing or not JSON", where=str(folder)) from error
    return TransformerLensBackend(folder, identity, compute_dtype, device)
