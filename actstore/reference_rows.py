"""The rows of the reference study, "SAE at scale: gpt2-medium on the Pile", as the packing rule `reference`.

Each document, stripped, is cut to its first seq_len tokens; the ids are decoded to text without special tokens, and the
text is tokenized again, behind BOS, and padded at its end to the longest text of the capture. BOS and padding are rows
like any other; nothing masks the padding, which sees the text before it. The study keeps the first
max_tokens // seq_len documents: here so many are padded together, and the next documents again. So the first block's
rows are the study's, and those behind it are held out from it.

Source: github.com/ashlrai/mechanistic-interpretability, src/mech_interp/datasets/corpus.py (`tokenize_corpus`) and
experiments/polysemanticity_sae.py (`_activations_from_corpus`); TransformerLens's `to_tokens`, which adds BOS and pads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from actstore.backends import Backend
from actstore.key import SequenceRule

STUDY_TOKENS = 8000  # the study's max_tokens: 125 documents of 64 tokens


def padded_documents(
    documents: Iterable[tuple[int, list[int]]], rule: SequenceRule, backend: Backend
) -> Iterator[tuple[int, list[int]]]:
    """Yield (document index, token ids) cut, tokenized again and padded; BOS is left to `Sequences`.

    Args:
        documents: (index, token ids) in corpus order.
        rule: seq_len, bos and pad_together.
        backend: its tokenizer and padding; a text longer than its context, once tokenized again, is cut to it.

    Example:
        >>> from actstore.backends.toy import ToyBackend
        >>> rule = SequenceRule(packing="reference", seq_len=4, bos=True, pad_together=2)
        >>> [ids for _, ids in padded_documents(enumerate([[65] * 9, [66], [67, 256, 67]]), rule, ToyBackend(4))]
        [[65, 65, 65, 65], [66, 256, 256, 256], [67, 67]]
    """
    stream = iter(documents)
    assert backend.pad is not None, "checked when the key is made"
    while block := list(islice(stream, rule.pad_together)):
        again = backend.tokenize(backend.decode([ids[: rule.seq_len] for _, ids in block]))
        again = [ids[: backend.context - rule.bos] if backend.context else ids for ids in again]
        longest = max(1, *map(len, again))
        yield from ((index, ids + [backend.pad] * (longest - len(ids))) for (index, _), ids in zip(block, again, strict=True))
