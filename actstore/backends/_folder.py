"""A model folder as save_pretrained writes it: weights' and tokenizer's identity, hub snapshots, errors with a name."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt

from actstore.digests import canonical_json, sha256_bytes, sha256_file
from actstore.errors import FormatError, UsageError
from actstore.key import ModelIdentity

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

    For the main thread: what stdout is, is the same for all threads.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    import transformers

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


def to_numpy(x: Any) -> npt.NDArray[Any]:
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
        with quiet():
            path = snapshot_download(model, revision=revision, allow_patterns=[*WEIGHT_FILES, *TOKENIZER_FILES])
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes when offline
        raise UsageError(
            f"the hub model {model!r} cannot be reached and is not cached ({type(error).__name__})",
            do="give a local folder instead: --model ./FOLDER (config.json, *.safetensors, tokenizer.json)",
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
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError("config.json is missing or not JSON", where=str(folder)) from error
    return folder, identity
