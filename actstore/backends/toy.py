"""A deterministic numpy model of no use but tests and documentation: bytes are tokens, no weights, no torch.

Named "toy:<d_model>", for example "toy:16". Its activations depend on the token, its position and all tokens before
it. A byte 1 gives NaN, a byte 2 gives 65520 and a byte 3 another number in every run, so that tests can ask for a
model that goes wrong at a chosen row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.backends import Vocabulary, nearest_hook
from actstore.digests import sha256_bytes
from actstore.errors import UsageError
from actstore.key import ComputeDtype, ModelIdentity

BOS = 256
EXAMPLE = ("toy:16", "blocks.1.hook_resid_pre")  # what the contract test asks for
HOOKS = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post"]


class ToyBackend:
    """See the module's first lines; `mlp.hook_post` is four times as wide as the other hook points."""

    name: Literal["toy"] = "toy"
    attention: Literal["none"] = "none"
    compute_dtype: ComputeDtype = "float32"
    device = "cpu"
    bos: int | None = BOS
    pad: int | None = BOS
    vocabulary_size = BOS + 1
    context: int | None = None

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        grid = np.outer(np.arange(1, BOS + 2), np.arange(1, 4 * d_model + 1))
        self._embedding = np.sin(grid * 0.7).astype(np.float32)  # (vocabulary, 4 d_model)

    def fingerprint(self) -> ModelIdentity:
        """Return the name, which is the whole model."""
        return ModelIdentity(source="toy", name=f"toy:{self.d_model}")

    def tokenizer_digest(self) -> str:
        """Return a constant: the tokenizer is UTF-8."""
        return sha256_bytes(b"toy: utf-8 bytes")

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the UTF-8 bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Return UTF-8 text; bytes of a character cut in two become U+FFFD."""
        return [bytes(i for i in row if i != BOS).decode("utf-8", "replace") for row in ids]

    def chat_template(self) -> str:
        """Return a template that only `render` below understands."""
        return "role: content"

    def render(self, messages: list[dict[str, Any]], template: str) -> str:
        """Return a line a message; the template is ignored. Raises: ValueError: a content that is no text."""
        if any(not isinstance(message["content"], str) for message in messages):
            raise ValueError("a content is no text")
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)

    def vocabulary(self) -> Vocabulary:
        """Return one character a byte, and BOS."""
        return Vocabulary(tokens=[*map(chr, range(BOS)), "<bos>"], special=[BOS])

    def widths(self, hooks: list[str]) -> list[int]:
        """Return d_model, or 4 d_model for `mlp.hook_post`."""
        for hook in hooks:
            if hook not in HOOKS:
                raise nearest_hook(hook, HOOKS)
        return [self.d_model * (4 if hook.endswith("mlp.hook_post") else 1) for hook in hooks]

    def weight_bytes(self, hooks: list[str]) -> int:
        """Return the size of the embedding."""
        return int(self._embedding.nbytes)

    def prepare(self, hooks: list[str]) -> None:
        """Do nothing: there are no weights."""

    def device_peak_bytes(self) -> int:
        """Return 0: there is no accelerator."""
        return 0

    def launch(
        self, tokens: npt.NDArray[np.int64], lengths: list[int], hooks: list[str], dtypes: list[str]
    ) -> Callable[[], list[npt.NDArray[Any]]]:
        """Return float32 running means of embeddings, scaled by the hook point's place; see Backend.launch."""
        widths, out = self.widths(hooks), []
        counts = np.arange(1, tokens.shape[1] + 1, dtype=np.float32)[None, :, None]
        for hook, width in zip(hooks, widths, strict=True):
            x = np.cumsum(self._embedding[tokens, :width], axis=1, dtype=np.float32) / counts * (1 + HOOKS.index(hook))
            x[tokens == 1] = np.nan
            x[tokens == 2] = 65520.0
            x[tokens == 3] = int.from_bytes(os.urandom(2))
            out.append(np.concatenate([row[:n] for row, n in zip(x, lengths, strict=True)]))
        return lambda: out


def load(model: str, revision: str | None, compute_dtype: str, device: str) -> ToyBackend:
    """Return the toy of this name. Raises: UsageError: not "toy:<1 to 4096>".

    Example:
        >>> load("toy:4", None, "auto", "cpu").tokenize(["hi"])
        [[104, 105]]
    """
    match = re.fullmatch(r"toy:([1-9][0-9]{0,3})", model)
    if match is None:
        raise UsageError(f"the toy backend has no model {model!r}", do="name it toy:16, the number is d_model")
    return ToyBackend(int(match[1]))
