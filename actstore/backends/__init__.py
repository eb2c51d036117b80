"""What runs a model: the files beside this one, by name. Adding a backend is adding a file with a `load` function."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from actstore.errors import UsageError
from actstore.key import Attention, BackendName, ComputeDtype, ModelIdentity, Strict


class Vocabulary(Strict):
    """The text of each token id, and which ids are special (BOS, EOS, padding, …). Kept in every store.

    `tokens[i]` is the text that token i adds behind another one, so joining the texts gives the document back.
    """

    tokens: list[str]
    special: list[int]

    def text(self, token: int) -> str:
        """Return a token's text; an id that the vocabulary does not have is shown as its number.

        Example:
            >>> Vocabulary(tokens=["a", " b"], special=[]).text(1), Vocabulary(tokens=[], special=[]).text(7)
            (' b', '<7>')
        """
        return self.tokens[token] if 0 <= token < len(self.tokens) else f"<{token}>"


class OutOfMemoryError(Exception):
    """The device has no memory for a batch of this size; a smaller one may fit."""


class Backend(Protocol):
    """One model, opened but not loaded: what the key needs is cheap, weights are loaded by `prepare`.

    Attributes:
        name: the backend's file name, recorded in the key.
        attention: the attention implementation, recorded in the key: kernels differ in the last digits.
        compute_dtype: the dtype the model computes in, resolved from "auto".
        device: the device the model runs on, such as "cpu" or "cuda"; not in the key.
        bos: the id of the BOS token, or None when the tokenizer has none.
        pad: the id that fills a batch's shorter texts, or None when the tokenizer has neither a padding nor an EOS token.
        vocabulary_size: token ids lie in [0, vocabulary_size).
        context: the longest sequence the model takes, in tokens, or None when it has no limit.
    """

    name: BackendName
    attention: Attention
    compute_dtype: ComputeDtype
    device: str
    bos: int | None
    pad: int | None
    vocabulary_size: int
    context: int | None

    def fingerprint(self) -> ModelIdentity:
        """Return which weights these are."""

    def tokenizer_digest(self) -> str:
        """Return the SHA-256 that identifies the tokenizer."""

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Return the text of each list of token ids, special tokens left out."""

    def chat_template(self) -> str:
        """Return the tokenizer's own chat template, a Jinja text. Raises: UsageError: it has none."""

    def render(self, messages: list[dict[str, Any]], template: str) -> str:
        """Return a chat as text. Raises: ValueError: the template refuses it, or is broken."""

    def vocabulary(self) -> Vocabulary:
        """Return the text of each token and the special ids."""

    def widths(self, hooks: list[str]) -> list[int]:
        """Return d_model of each hook point before any weight is loaded.

        Raises: UsageError: the model has no such hook point (nearest names listed), or it is not one vector a token.
        """

    def weight_bytes(self, hooks: list[str]) -> int:
        """Return the memory that the weights up to the last of the hook points take, in bytes; loads none of them."""

    def prepare(self, hooks: list[str]) -> None:
        """Load the weights up to the last of the hook points, if that is not done yet; `launch` does it otherwise."""

    def device_peak_bytes(self) -> int:
        """Return the most memory of an accelerator that tensors have taken so far, in bytes; 0 on a CPU."""

    def launch(
        self, tokens: npt.NDArray[np.int64], lengths: list[int], hooks: list[str], dtypes: list[str]
    ) -> Callable[[], list[npt.NDArray[Any]]]:
        """Start the model on a batch, up to the last of the hook points; a device works on while the caller does.

        Args:
            tokens: (batch, seq_len) int64; a sequence shorter than seq_len is padded at its end with any id.
            lengths: real tokens of each sequence.
            hooks: hook point names, checked by `widths`.
            dtypes: for each hook point the float dtype its rows are wanted in; a backend may leave conversion to others.

        Returns: a function that waits for the batch and gives for each hook point its rows, (sum of lengths, d_model),
            sequence after sequence.
        Raises: OutOfMemoryError.
        """


def backend_names() -> list[str]:
    """Return the names of all backends.

    Example:
        >>> "transformers" in backend_names()
        True
    """
    return sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))


def load_backend(
    name: str, model: str, revision: str | None, compute_dtype: str, device: str, hooks: tuple[str, ...] = ()
) -> Backend:
    """Open a model with a backend; cheap, no weights are loaded.

    Args:
        name: one of `backend_names()`, or "auto": the fast engine where it knows the model and all hook points,
            transformer_lens elsewhere.
        model: local folder or hub id.
        revision: hub branch, tag or commit; None for the default branch.
        compute_dtype: "auto" for the checkpoint's own, or a dtype's name.
        device: "auto", "cpu", "cuda", "mps".
        hooks: the hook points that will be asked for; only "auto" looks at them.

    Raises: UsageError: no such backend, folder or hub model.

    Example:
        >>> load_backend("toy", "toy:16", None, "auto", "auto").widths(["hook_embed"])
        [16]
    """
    if name == "auto":
        fast = import_module(f"{__name__}.transformers")
        name = "transformers" if fast.serves(model, revision, hooks) else "transformer_lens"
    if name not in backend_names():
        raise UsageError(f"no backend {name!r}", do=f"one of auto, {', '.join(backend_names())}")
    module = import_module(f"{__name__}.{name}")
    return cast(Backend, module.load(model, revision, compute_dtype, device))


def nearest_hook(wanted: str, names: list[str]) -> UsageError:
    """Return the error for an unknown hook point, listing the nearest names.

    Example:
        >>> print(nearest_hook("blocks.1.hook_resid_per", ["blocks.1.hook_resid_pre", "hook_embed"]).do)
        nearest: blocks.1.hook_resid_pre
    """
    from difflib import get_close_matches

    near = get_close_matches(wanted, names, n=5, cutoff=0.6) or [name for name in names if "resid" in name][:5] or names[:5]
    return UsageError(f"the model has no hook point {wanted!r}", do=f"nearest: {', '.join(near)}")
