"""What the backends that run a model folder share: config, tokenizer, identity, dtype and device, hub snapshots.

A folder is what save_pretrained writes (config.json, *.safetensors, the tokenizer's files); weights are loaded as
published, without folding or centring, so a residual stream equals the Hugging Face hidden state.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

from actstore.backends import Vocabulary
from actstore.digests import canonical_json, sha256_bytes, sha256_file
from actstore.errors import FormatError, UsageError
from actstore.key import ComputeDtype, ModelIdentity
from actstore.weights import elements_up_to

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def digest_of(files: list[Path]) -> str:
    """Return one SHA-256 over names and contents of files, in the order of their names."""
    return sha256_bytes(canonical_json(sorted((f.name, sha256_file(f)) for f in files)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' prints off stdout, which carries our result, and their progress bars and warnings off stderr.

    Code that comes with a model is refused, and transformers is kept from asking whether to run it: it takes the answer
    from stdin, which may be a file. For the main thread: what stdout is, is the same for all threads.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    import transformers

    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def named(folder: Path, what: str) -> Iterator[None]:
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


class FolderModel:
    """A model folder (local, or a hub snapshot), opened but not loaded.

    Args:
        folder: holds config.json, *.safetensors and the tokenizer's files.
        identity: what the key says of the weights.
        compute_dtype: "auto" or a dtype's name.
        device: "auto", "cpu", "cuda" or "mps".

    Raises: UsageError: config or tokenizer cannot be read; a dtype that is not supported.
    """

    loads_head = True  # whether the unembedding is loaded

    def __init__(self, folder: Path, identity: ModelIdentity, compute_dtype: str, device: str) -> None:
        import torch
        import transformers

        self.folder, self._identity = folder, identity
        try:
            with quiet():
                self.config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"config or tokenizer cannot be read: {str(error).splitlines()[0][:200]}",
                where=str(folder),
                do="the folder must hold config.json, *.safetensors and tokenizer.json, as save_pretrained writes them; "
                "code that comes with a model is never run",
            ) from error
        self.compute_dtype: ComputeDtype = self._dtype(compute_dtype)
        there = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
        if device not in ("auto", *there):
            raise UsageError(f"there is no {device} device for this torch ({torch.__version__})", do=f"--device {there[0]}")
        self.device = there[0] if device == "auto" else device
        self.bos: int | None = self.tokenizer.bos_token_id
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.pad: int | None = eos if pad is None else pad  # as TransformerLens does
        self.vocabulary_size = int(self.config.get_text_config().vocab_size)
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = context if isinstance(context, int) else None

    def _dtype(self, wanted: str) -> ComputeDtype:
        own = str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = own if wanted == "auto" else wanted
        if dtype not in get_args(ComputeDtype):
            raise UsageError(f"the checkpoint's dtype is {dtype}", do="name one: --compute-dtype float32|float16|bfloat16")
        return cast(ComputeDtype, dtype)

    def fingerprint(self) -> ModelIdentity:
        """Return the hub id and commit, or the digest of the local folder's weights and config."""
        if self._identity.source == "hub":
            return self._identity
        files = [f for pattern in WEIGHT_FILES for f in self.folder.glob(pattern)]
        return ModelIdentity(source="local", digest=digest_of(files))

    def tokenizer_digest(self) -> str:
        """Return one SHA-256 over the tokenizer's files."""
        return digest_of([f for name in TOKENIZER_FILES if (f := self.folder / name).is_file()])

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of each text, without special tokens and without a limit of length."""
        # Not within `quiet`, which turns all threads' stdout round: this runs in the reader's thread.
        encoded = self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)
        return cast(list[list[int]], encoded["input_ids"])

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Return texts without special tokens; spaces are cleaned up only where the tokenizer's own config says so."""
        return cast(list[str], self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    def chat_template(self) -> str:
        """Return the tokenizer's own chat template; see Backend.chat_template."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            raise UsageError(
                "the tokenizer has no chat template" if template is None else "the tokenizer has several chat templates",
                str(self.folder),
                "give one as a file: --chat-template FILE.jinja",
            )
        return template

    def render(self, messages: list[dict[str, Any]], template: str) -> str:
        """Return a chat as text, in transformers' sandbox; a BOS at its beginning is left to `--bos`. See Backend.render."""
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cast(str, text).removeprefix(self.tokenizer.bos_token or "")

    def vocabulary(self) -> Vocabulary:
        """Return the text that each id adds behind another token: behind an anchor, so that leading spaces show."""
        ids = range(self.vocabulary_size)
        anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        prefix = len(self.tokenizer.decode([anchor], clean_up_tokenization_spaces=False))
        texts = self.tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
        special = sorted(i for i in self.tokenizer.all_special_ids if i < self.vocabulary_size)
        return Vocabulary(tokens=[text[prefix:] for text in texts], special=special)

    def device_peak_bytes(self) -> int:
        """Return the most memory of the GPUs that tensors have taken so far, in bytes; 0 elsewhere."""
        import torch

        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))

    def config_of(self, layers: int) -> Any:
        """Return the config of the model's first layers."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.folder)
        config.num_hidden_layers = layers
        if config.__dict__.get("layer_types"):  # some models work it out
            config.layer_types = config.layer_types[:layers]
        return config

    def refuse_missing(self, layers: int) -> None:
        """Make sure that the files hold every tensor of the first layers; transformers invents those that they do not.

        Reads no weights: the model is made on torch's device without memory.

        Raises: FormatError: naming the tensors.
        """
        import transformers

        if type(self.config) not in transformers.MODEL_MAPPING or getattr(self.config, "quantization_config", None):
            return  # not to be had as a plain model: what loads it has to see to that
        with named(self.folder, "the weights cannot be loaded"), quiet():
            _, report = transformers.AutoModel.from_pretrained(
                self.folder, config=self.config_of(layers), device_map="meta", use_safetensors=True, output_loading_info=True
            )
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)  # BERT's: no hook point needs it
        if missing:
            raise FormatError(
                f"the weights of {len(missing)} tensors are missing: {', '.join(missing[:5])}",
                str(self.folder),
                "copy the model folder again, all of its *.safetensors",
            )

    def layers_for(self, hooks: list[str]) -> int:
        """Return how many layers the hook points need."""
        raise NotImplementedError

    def weight_bytes(self, hooks: list[str]) -> int:
        """Return the bytes of the tensors to be loaded; see Backend.weight_bytes."""
        with named(self.folder, "the weights cannot be read"):
            elements = elements_up_to(self.folder, self.layers_for(hooks), self.loads_head)
        return elements * (4 if self.compute_dtype == "float32" else 2)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return int(self.config.get_text_config().num_hidden_layers)


def _snapshot(model: str, revision: str | None) -> tuple[Path, ModelIdentity]:
    """Fetch a hub model's config, safetensors and tokenizer files (or find them cached) and resolve its commit."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            path = snapshot_download(model, revision=revision, allow_patterns=[*WEIGHT_FILES, *TOKENIZER_FILES])
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes when offline
        near = get_close_matches(model, [name for name in os.listdir() if os.path.isfile(f"{name}/config.json")])
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UsageError(
            f"the hub model {model!r} cannot be reached{offline} and is not cached ({type(error).__name__})",
            do=f"give a local folder: --model ./{near[0] if near else 'FOLDER'} (config.json, *.safetensors, tokenizer.json)",
        ) from error
    folder = Path(path)
    return folder, ModelIdentity(source="hub", name=model, revision=folder.name)


def open_folder(model: str, revision: str | None) -> tuple[Path, ModelIdentity]:
    """Return the folder of a model, local or a hub id's snapshot, and what the key says of it; reads no weights.

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
    read_config(folder)
    return folder, identity


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's config as it is in its file. Raises: FormatError: missing, or not a JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError("config.json is missing or not JSON", where=str(folder)) from error
    if not isinstance(config, dict):
        raise FormatError("config.json is no JSON object", where=str(folder))
    return config
