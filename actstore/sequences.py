"""Documents into sequences of token ids: a function of corpus, tokenizer and sequence rule alone.

Sequences are never padded (but by the rule `reference`), so every row of a store is a real token. All token ids are held
in memory: 8 bytes a token (id and document), against 2 to 4 bytes times d_model a token on disk. They grow while a thread
reads the corpus.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.corpus import Document
from actstore.errors import CorpusError, KeyMismatch
from actstore.key import SequenceRule
from actstore.limits import MAX_ROWS

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Tokenize = Callable[[list[str]], list[list[int]]]
Tokenized = list[tuple[int, list[int]]]  # documents: their index, and their token ids
_DOCUMENTS_AT_ONCE = 256  # tokenizers run a batch on all cores
_TOKENS_AT_ONCE = 1 << 16  # gathered before they are cut: numpy costs microseconds a call


class _Growing:
    """An array that grows at its end; a view taken before stays valid."""

    def __init__(self, dtype: type) -> None:
        self._array: npt.NDArray[Any] = np.zeros(1 << 10, dtype)
        self._length = 0

    def append(self, more: npt.NDArray[Any]) -> None:
        """Add to the end."""
        needed = self._length + len(more)
        if needed > len(self._array):
            larger = np.zeros(max(needed, 2 * len(self._array)), self._array.dtype)
            larger[: self._length] = self._array[: self._length]
            self._array = larger
        self._array[self._length : needed] = more
        self._length = needed

    @property
    def view(self) -> npt.NDArray[Any]:
        """What there is so far."""
        length = self._length  # before the array: another thread may be appending
        return self._array[:length]


class Sequences:
    """Token ids cut into sequences, and sequences into batches of the model.

    `pack` joins the documents in order into sequences of exactly seq_len tokens; the last, incomplete one is left
    out. `truncate` makes one sequence of each document, of its first tokens up to seq_len; `reference` one of all tokens
    of each, which `reference_rows` has cut and padded. A batch is as many
    sequences in a row as have at most `batch_tokens` tokens when each is padded to the longest of them. Reading stops
    at the end of the batch that holds the last of `rows` rows: so the model sees the same batches whatever number of
    rows is asked for, and stores of one corpus share their row groups bit for bit.

    Args:
        rule: packing, seq_len and whether each sequence starts with BOS.
        bos: the BOS token's id; needed when rule.bos.
        rows: rows asked for, or None for all.
        batch_tokens: tokens of one batch, at most, padding included; a batch has one sequence at least.

    Example:
        >>> s = Sequences(SequenceRule(packing="pack", seq_len=3, bos=True), bos=0)
        >>> s.read([(0, [5, 6, 7, 8])])
        >>> s.tokens.tolist(), s.starts.tolist()
        ([0, 5, 6, 0, 7, 8], [0, 3, 6])
    """

    def __init__(self, rule: SequenceRule, bos: int | None, rows: int | None = None, batch_tokens: int = 1) -> None:
        assert bos is not None or not rule.bos, "checked when the key is made"
        self.rule, self.batch_tokens, self._bos, self._wanted = rule, batch_tokens, bos, rows
        self._tokens, self._documents = _Growing(np.int32), _Growing(np.int32)
        self._starts, self._batches = _Growing(np.int64), _Growing(np.int64)
        self._starts.append(np.zeros(1))
        self._batches.append(np.zeros(1))
        self._carry = np.zeros(0, np.int32), np.zeros(0, np.int32)  # token ids and their documents, not yet a sequence
        self._open = (0, 0)  # sequences of the batch being filled, and the longest of them
        self._grown = threading.Condition()
        self._finished, self._abandoned = False, False
        self._error: BaseException | None = None

    @property
    def tokens(self) -> Int32:
        """(rows,) int32, all sequences read so far, one after another, BOS included."""
        return self._tokens.view

    @property
    def documents(self) -> Int32:
        """(rows,) int32, the document each token comes from; BOS counts to the token after it."""
        return self._documents.view

    @property
    def starts(self) -> Int64:
        """(n_sequences + 1,) int64, the row where each sequence begins, and the row after the last."""
        return self._starts.view

    @property
    def batches(self) -> Int64:
        """(n_batches + 1,) int64, the sequence where each complete batch begins, and the one after the last."""
        return self._batches.view

    @property
    def rows(self) -> int:
        """Tokens in all sequences read so far."""
        return len(self.tokens)

    def positions(self, start: int, stop: int) -> Int32:
        """Return the position in its sequence of each row in [start, stop), (stop - start,) int32."""
        rows, starts = np.arange(start, stop), self.starts
        return (rows - starts[np.searchsorted(starts, rows, "right") - 1]).astype(np.int32)

    def covering(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of sequences that rows [start, stop) lie in; the first and last may reach beyond it."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        return first, int(np.searchsorted(self.starts, stop, "left"))

    def batches_of(self, start: int, stop: int) -> range:
        """Return the batches that rows [start, stop) lie in."""
        first, last = self.covering(start, stop)
        low, high = np.searchsorted(self.batches, first, "right") - 1, np.searchsorted(self.batches, last, "left")
        return range(int(low), int(high))

    def wait(self, rows: int | None = None) -> None:
        """Wait until the batches of the first `rows` rows are there, or all that are asked for when None.

        Raises: CorpusError: what reading found wrong; no sequence at all, or fewer rows than asked for.
        """
        with self._grown:
            self._grown.wait_for(lambda: self._error or self._finished or (rows is not None and self.rows_in_batches >= rows))
        if self._error is not None:
            raise self._error

    @property
    def finished(self) -> bool:
        """Whether all that was asked for has been read."""
        return self._finished

    @property
    def rows_in_batches(self) -> int:
        """Rows in complete batches, so far."""
        return int(self.starts[self.batches[-1]])

    def read(self, documents: Iterable[tuple[int, list[int]]], verify: Callable[[], None] = lambda: None) -> None:
        """Cut tokenized documents, given as (document index, token ids) in corpus order; read no more than needed.

        `verify` is called after the last one: what it raises is raised here, and nothing counts as read.

        Raises: CorpusError: no sequence at all, or fewer rows than asked for.
        """
        pending: list[tuple[int, list[int]]] = []
        waiting, wanted = 0, self._wanted or MAX_ROWS
        for index, ids in documents:
            pending.append((index, ids))
            waiting += len(ids)
            # Close to the end each document is cut at once, so that none is read in vain; BOS at most doubles the rows.
            if waiting >= _TOKENS_AT_ONCE or self.rows_in_batches + 2 * (waiting + len(self._carry[0])) >= wanted:
                self._cut(pending)
                pending, waiting = [], 0
            if self._abandoned or self.rows_in_batches >= wanted:
                break
        self._cut(pending, last=True)
        if not self.rows:
            raise CorpusError(
                f"the corpus gives 0 sequences: {len(self._carry[0])} tokens, a sequence has {self.rule.seq_len}",
                do="use a larger corpus, a shorter --seq-len, or --packing truncate",
            )
        if self._wanted is not None and self.rows < self._wanted and not self._abandoned:
            raise CorpusError(
                f"the corpus gives {self.rows} rows, {self._wanted} were asked for",
                do=f"--rows {self.rows}, or leave --rows out for all",
            )
        verify()
        with self._grown:
            self._finished = True
            self._grown.notify_all()

    def _cut(self, documents: list[tuple[int, list[int]]], last: bool = False) -> None:
        """Add documents' sequences; `pack` carries what is no full sequence yet over to the next documents."""
        pack, body = self.rule.packing == "pack", self.rule.seq_len - self.rule.bos
        kept = [ids[:body] if self.rule.packing == "truncate" else ids for _, ids in documents]
        tokens = np.concatenate([self._carry[0], *(np.asarray(ids, np.int32) for ids in kept)])
        owners = np.concatenate(
            [self._carry[1], *(np.full(len(k), i, np.int32) for (i, _), k in zip(documents, kept, strict=True))]
        )
        if pack:
            cut = len(tokens) // body * body
            self._carry = tokens[cut:], owners[cut:]
            tokens, owners, inner = tokens[:cut], owners[:cut], np.arange(0, cut + 1, body)
        else:
            inner = np.cumsum([0, *map(len, kept)])
        if self.rule.bos:
            tokens = np.insert(tokens, inner[:-1], np.int32(self._bos))  # type: ignore[arg-type]
            owners = np.insert(owners, inner[:-1], owners[inner[:-1]])
        lengths = np.diff(inner) + self.rule.bos
        with self._grown:
            before = self.rows
            self._tokens.append(tokens)
            self._documents.append(owners)
            self._starts.append(before + np.cumsum(lengths))
            self._batch(lengths, last)
            self._grown.notify_all()

    def _batch(self, lengths: npt.NDArray[Any], last: bool) -> None:
        """Put sequences of these lengths into batches; a batch is complete once no sequence of its width fits in any more."""
        (n, longest), closed = self._open, []
        for sequence, length in enumerate(lengths.tolist(), len(self.starts) - 1 - len(lengths)):
            if n and (n + 1) * max(longest, length) > self.batch_tokens:
                closed.append(sequence)
                n, longest = 0, 0
            n, longest = n + 1, max(longest, length)
            if (n + 1) * longest > self.batch_tokens:
                closed.append(sequence + 1)
                n, longest = 0, 0
        if last and n:
            closed.append(len(self.starts) - 1)
            n, longest = 0, 0
        self._open = n, longest
        self._batches.append(np.array(closed, np.int64))

    @contextlib.contextmanager
    def reading(self, documents: Iterable[tuple[int, list[int]]], verify: Callable[[], None]) -> Iterator[None]:
        """Read as `read` does, in a thread of its own, ahead of the model; what goes wrong there is raised by `wait`."""

        def work() -> None:
            try:
                self.read(documents, verify)
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread, and raised there
                with self._grown:
                    self._error = error
                    self._grown.notify_all()

        thread = threading.Thread(target=work, name="actstore-reader", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._abandoned = True
            thread.join()


def tokenized(
    documents: Iterable[Document], tokenize: Tokenize, vocabulary: int, on_block: Callable[[Tokenized], None] = lambda block: None
) -> Iterator[tuple[int, list[int]]]:
    """Yield (document index, token ids) of each document that has tokens; documents of token ids as they are.

    Args:
        documents: in corpus order.
        tokenize: texts to token ids, without special tokens.
        vocabulary: ids must lie in [0, vocabulary).
        on_block: called with every block of documents, before any of it is passed on and before the next one is read.

    Raises: KeyMismatch: the tokenizer gives an id that the model has no embedding for.

    Example:
        >>> list(tokenized([Document(0, "ab"), Document(2, [5])], lambda texts: [[1, 2] for _ in texts], vocabulary=10))
        [(0, [1, 2]), (2, [5])]
    """
    stream = iter(documents)
    while batch := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        texts = [d.content for d in batch if isinstance(d.content, str)]
        of_text = iter(tokenize(texts) if texts else [])
        block = [(d.index, next(of_text) if isinstance(d.content, str) else d.content) for d in batch]
        for index, ids in block:
            if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
                raise KeyMismatch(
                    f"token id {max(ids)} of document {index} is outside the model's vocabulary of {vocabulary}",
                    do="the tokenizer belongs to another model: use the folder that holds both",
                )
        on_block(block)
        yield from ((index, ids) for index, ids in block if ids)
