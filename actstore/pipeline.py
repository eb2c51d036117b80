"""From model batches to row groups: which batches are needed, rows gathered into groups, one thread that writes them.

Batch b is sequences [b B, (b + 1) B) for all stores alike, so a row group is made of the same batches whether its
capture was interrupted or not, and whatever other hook points were asked for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.sequences import Sequences
from actstore.writer import StoreWriter, put_rows, to_stored
from actstore.zarr_array import row_dtype

Array = npt.NDArray[Any]
Job = Callable[[], None]
QUEUED_GROUPS = 2  # row groups waiting for the disk, at most 32 MiB each: the bound of the write-behind's memory


def batches(sequences: Sequences, collectors: list[Collector], per_batch: int) -> Iterator[tuple[tuple[int, int], bool]]:
    """Yield ([first, last) sequence, whether any row of it is missing) of every batch, in order."""
    rows = collectors[0].writer.rows
    end = sequences.covering(0, rows)[1]
    for first in range(0, end, per_batch):
        last = min(end, first + per_batch)
        span = int(sequences.starts[first]), min(rows, int(sequences.starts[last]))
        yield (first, last), any(c.wants(*span) for c in collectors)


def padded(sequences: Sequences, first: int, last: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Return the sequences [first, last) as (batch, longest) int64, padded with 0 at the end, and their lengths."""
    starts = sequences.starts[first : last + 1]
    lengths = np.diff(starts)
    tokens = np.zeros((last - first, int(lengths.max())), np.int64)
    tokens[np.arange(tokens.shape[1])[None, :] < lengths[:, None]] = sequences.tokens[starts[0] : starts[-1]]
    return tokens, lengths.tolist()


class Collector:
    """Gathers one hook point's rows from batches into row groups, in order, and hands complete ones to the writer."""

    def __init__(self, writer: StoreWriter, sequences: Sequences) -> None:
        self.writer, self._sequences = writer, sequences
        self._missing = set(writer.missing_row_groups())
        self._buffer: Array | None = None

    def wants(self, start: int, stop: int) -> bool:
        """Return whether rows [start, stop) touch a missing row group."""
        size = self.writer.group_rows
        return stop > start and any(g in self._missing for g in range(start // size, (stop - 1) // size + 1))

    def add(self, first: int, acts: Array, put: Callable[[Job], None]) -> None:
        """Take the rows from `first` on; hand a row group to `put` when its last row is there."""
        if self.writer.key.center:
            acts = (acts - acts.astype(np.float64).mean(axis=1, keepdims=True)).astype(acts.dtype)
        size, end = self.writer.group_rows, min(self.writer.rows, first + len(acts))
        for group in range(first // size, (end - 1) // size + 1):
            if group not in self._missing:
                continue
            start, stop = self.writer.span(group)
            low, high = max(first, start), min(end, stop)
            stored = to_stored(acts[low - first : high - first], self.writer.key.dtype, self.writer.key.hook, low)
            if self._buffer is None:
                self._buffer = np.empty((stop - start, self.writer.d_model), row_dtype(self.writer.key.dtype))
            self._buffer[low - start : high - start] = stored
            if high == stop:
                put(self._commit(group, self._buffer))
                self._buffer = None

    def _commit(self, group: int, acts: Array) -> Job:
        start, stop = self.writer.span(group)
        tokens, documents = self._sequences.tokens[start:stop], self._sequences.documents[start:stop]
        return lambda: put_rows(self.writer, group, acts, tokens, documents, self._sequences.positions(start, stop))


@contextlib.contextmanager
def write_behind() -> Iterator[Callable[[Job], None]]:
    """Run jobs in one thread behind a bounded queue. What was queued is finished, also when the caller is interrupted."""
    jobs: queue.Queue[Job | None] = queue.Queue(QUEUED_GROUPS)
    failed: list[BaseException] = []

    def work() -> None:
        while (job := jobs.get()) is not None:
            try:
                if not failed:
                    job()
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread, and raised there
                failed.append(error)

    def put(job: Job) -> None:
        if failed:
            raise failed[0]
        jobs.put(job)

    thread = threading.Thread(target=work, name="actstore-writer")
    thread.start()
    try:
        yield put
    finally:
        jobs.put(None)
        thread.join()
    if failed:
        raise failed[0]
