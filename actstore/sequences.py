"""Documents into sequences of token ids: a function of corpus, tokenizer and sequence rule alone.

Sequences are never padded, so every row of a store is a real token. All token ids are held in memory: 8 bytes a token
(id and document), against 2 to 4 bytes times d_model a token on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from actstore.corpus import Document
from actstore.errors import CorpusError, KeyMismatch
from actstore.key import SequenceRule

Int32 = npt.NDArray[np.int32]
Tokenize = Callable[[list[str]], list[list[int]]]
_DOCUMENTS_AT_ONCE = 256  # tokenizers run a batch on all cores


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids cut into sequences.

    Args:
        tokens: (rows,) int32, all sequences one after another, BOS included.
        documents: (rows,) int32, the document each token comes from; BOS counts to the token after it.
        starts: (n_sequences + 1,) int64, the row where each sequence begins, and the row after the last.
    """

    tokens: Int32
    documents: Int32
    starts: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Tokens in all sequences."""
        return len(self.tokens)

    def positions(self, start: int, stop: int) -> Int32:
        """Return the position in its sequence of each row in [start, stop), (stop - start,) int32."""
        rows = np.arange(start, stop)
        return (rows - self.starts[np.searchsorted(self.starts, rows, "right") - 1]).astype(np.int32)

    def covering(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of sequences that rows [start, stop) lie in; the first and last may reach beyond it."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        return first, int(np.searchsorted(self.starts, stop, "left"))


def tokenized(documents: Iterable[Document], tokenize: Tokenize, vocabulary: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (document index, token ids) of each document that has tokens.

    Args:
        documents: in corpus order.
        tokenize: texts to token ids, without special tokens.
        vocabulary: ids must lie in [0, vocabulary).

    Raises: KeyMismatch: the tokenizer gives an id that the model has no embedding for.
    """
    stream = iter(documents)
    while batch := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        for document, ids in zip(batch, tokenize([d.text for d in batch]), strict=True):
            if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
                raise KeyMismatch(
                    f"token id {max(ids)} of document {document.index} is outside the model's vocabulary of {vocabulary}",
                    do="the tokenizer belongs to another model: use the folder that holds both",
                )
            if ids:
                yield document.index, ids


def make_sequences(
    documents: Iterable[tuple[int, list[int]]], rule: SequenceRule, bos: int | None, rows: int | None = None, per_batch: int = 1
) -> Sequences:
    """Cut tokenized documents into sequences.

    `pack` joins the documents in order into sequences of exactly seq_len tokens; the last, incomplete one is left
    out. `truncate` makes one sequence of each document, of its first tokens up to seq_len. Reading stops as soon as
    `rows` rows are complete, and the batch that the last of them is in: so the model sees the same batches whatever
    number of rows is asked for, and stores of one corpus share their row groups bit for bit.

    Args:
        documents: (document index, token ids) in corpus order.
        rule: packing, seq_len and whether each sequence starts with BOS.
        bos: the BOS token's id; needed when rule.bos.
        rows: rows asked for, or None for all.
        per_batch: sequences of one batch of the model.

    Raises: CorpusError: no sequence at all, or fewer rows than asked for.

    Example:
        >>> rule = SequenceRule(packing="pack", seq_len=3, bos=True)
        >>> s = make_sequences([(0, [5, 6, 7, 8])], rule, bos=0)
        >>> s.tokens.tolist(), s.starts.tolist()
        ([0, 5, 6, 0, 7, 8], [0, 3, 6])
    """
    body = rule.seq_len - rule.bos
    ids, owners = _gather(documents, rule, rows, per_batch)
    lengths = [len(i) for i in ids]
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    documents_of = np.concatenate(owners) if owners else np.zeros(0, np.int32)
    if rule.packing == "pack":
        cut = len(tokens) // body * body
        tokens, documents_of = tokens[:cut], documents_of[:cut]
        inner = np.arange(0, cut + 1, body)
    else:
        inner = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if rule.bos:
        assert bos is not None, "checked by the backend when the key is made"
        tokens = np.insert(tokens, inner[:-1], np.int32(bos))
        documents_of = np.insert(documents_of, inner[:-1], documents_of[inner[:-1]])
    starts = (inner + np.arange(len(inner)) * rule.bos).astype(np.int64)
    if not len(tokens):
        raise CorpusError(
            f"the corpus gives 0 sequences: {sum(lengths)} tokens in {len(lengths)} documents, a sequence has {rule.seq_len}",
            do="use a larger corpus, a shorter --seq-len, or --packing truncate",
        )
    if rows is not None and len(tokens) < rows:
        raise CorpusError(
            f"the corpus gives {len(tokens)} rows, {rows} were asked for", do=f"--rows {len(tokens)}, or leave --rows out for all"
        )
    return Sequences(tokens, documents_of, starts)


def _gather(
    documents: Iterable[tuple[int, list[int]]], rule: SequenceRule, rows: int | None, per_batch: int
) -> tuple[list[Int32], list[Int32]]:
    """Return the token ids to be used of each document, and their document index; read no further than needed."""
    pack, body = rule.packing == "pack", rule.seq_len - rule.bos
    ids: list[Int32] = []
    owners: list[Int32] = []
    read, wanted = 0, None
    for index, document in documents:
        kept = document if pack else document[:body]
        ids.append(np.asarray(kept, np.int32))
        owners.append(np.full(len(kept), index, np.int32))
        read += len(kept)
        complete = read // body if pack else len(ids)
        done = complete * rule.seq_len if pack else read + complete * rule.bos
        if rows is not None and wanted is None and done >= rows:
            needed = -(-rows // rule.seq_len) if pack else complete
            wanted = -(-needed // per_batch) * per_batch
        if wanted is not None and complete >= wanted:
            break
    return ids, owners
