"""From model batches to row groups: rows gathered into the groups this process claimed, one thread that writes them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import NonFiniteActivation, StorageFailed
from actstore.sequences import Sequences
from actstore.timeline import Timeline
from actstore.writer import StoreWriter, put_rows
from actstore.zarr_array import row_dtype

Array = npt.NDArray[Any]
Job = Callable[[Timeline], None]
Share = Callable[[StoreWriter, int], bool]
QUEUED_GROUPS = 2  # row groups waiting for the disk, at most 32 MiB each: the bound of the write-behind's memory


def padded(sequences: Sequences, first: int, last: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Return the sequences [first, last) as (batch, longest) int64, padded with 0 at the end, and their lengths."""
    starts = sequences.starts[first : last + 1]
    lengths = np.diff(starts)
    tokens = np.zeros((last - first, int(lengths.max())), np.int64)
    tokens[np.arange(tokens.shape[1])[None, :] < lengths[:, None]] = sequences.tokens[starts[0] : starts[-1]]
    return tokens, lengths.tolist()


def to_stored(acts: Array, dtype: str, hook: str, first_row: int) -> Array:
    """Return activations in the stored dtype (float32 where that is int8); nothing that is not a finite number gets through.

    Args:
        acts: (rows, d_model) float array.
        dtype: the stored dtype's name.
        hook: hook point, for the message.
        first_row: row of the store where `acts` begins, for the message.

    Raises: NonFiniteActivation: NaN or Inf, or a value beyond the stored dtype's range.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(acts.astype(row_dtype(dtype), copy=False))
        finite = np.isfinite(stored)
    if finite.all():
        return stored
    row, column = (int(i) for i in np.argwhere(~finite)[0])
    value = float(acts[row, column])
    where = f"hook point {hook}, row {first_row + row}, dimension {column}; {int((~finite).sum())} values of this batch"
    if np.isfinite(value) or (acts.dtype == np.float16 and np.isinf(value)):  # converted where the model runs
        named = f"{value:g} is" if np.isfinite(value) else "is infinite or"
        raise NonFiniteActivation(f"the activation {named} beyond the range of {dtype}", where, "use --dtype float32 or bfloat16")
    raise NonFiniteActivation(
        f"the model gave {value}",
        where,
        "try --compute-dtype float32; a text that breaks the model can be left out of the corpus",
    )


class Collector:
    """Gathers one hook point's rows from batches into the row groups this process has claimed, and hands them on.

    Args:
        writer: the unsealed store.
        sequences: the corpus, cut.
        only: the row groups to fill; None for all.
        share: links a claimed row group from another store, or returns False.
    """

    def __init__(
        self, writer: StoreWriter, sequences: Sequences, only: Iterable[int] | None = None, share: Share = lambda w, i: False
    ) -> None:
        self.writer, self._sequences, self._share = writer, sequences, share
        self._only = frozenset(range(writer.n_groups) if only is None else only)
        self._claims: dict[int, contextlib.ExitStack] = {}  # held until the row group is committed
        self._todo: set[int] = set()  # claimed, and not all of its rows are here yet
        self._mine: set[int] = set()
        self._buffer: Array | None = None

    def _groups(self, start: int, stop: int) -> range:
        size = self.writer.group_rows
        return range(start // size, (min(stop, self.writer.rows) - 1) // size + 1)

    def claim(self, start: int, stop: int) -> None:
        """Claim what is missing of rows [start, stop) and nobody else has; what another store holds is linked at once."""
        known = self._mine, self.writer.committed
        groups = [g for g in self._groups(start, stop) if g in self._only and not any(g in those for those in known)]
        for group, claim in zip(groups, self.writer.claims(groups), strict=True):
            if claim is not None:
                self._claims[group] = claim  # before anything can fail: `close` frees it
                if self._share(self.writer, group):
                    self._claims.pop(group).close()
                else:
                    self._todo.add(group)
                    self._mine.add(group)

    def wants(self, start: int, stop: int) -> bool:
        """Return whether rows [start, stop) touch a row group that this process has to compute."""
        return any(g in self._todo for g in self._groups(start, stop))

    def has(self, start: int, stop: int) -> bool:
        """Return whether each row group of rows [start, stop) is committed, or computed by this process."""
        done = self._mine, self.writer.committed
        left = [g for g in self._groups(start, stop) if g in self._only and not any(g in groups for groups in done)]
        return not left or self.writer.is_sealed()

    def add(self, first: int, acts: Array) -> list[Job]:
        """Take the rows from `first` on; return the jobs that commit the row groups now complete."""
        if self.writer.key.center:
            acts = (acts - acts.astype(np.float64).mean(axis=1, keepdims=True)).astype(acts.dtype)
        jobs, end = [], min(self.writer.rows, first + len(acts))
        for group in self._groups(first, end):
            if group not in self._todo:
                continue
            start, stop = self.writer.span(group)
            low, high = max(first, start), min(end, stop)
            stored = to_stored(acts[low - first : high - first], self.writer.key.dtype, self.writer.key.hook, low)
            if self._buffer is None:
                self._buffer = np.empty((stop - start, self.writer.d_model), row_dtype(self.writer.key.dtype))
            self._buffer[low - start : high - start] = stored
            if high == stop:
                jobs.append(self._commit(group, self._buffer))
                self._todo.discard(group)
                self._buffer = None
        return jobs

    def _commit(self, group: int, acts: Array) -> Job:
        start, stop = self.writer.span(group)
        tokens, documents = self._sequences.tokens[start:stop], self._sequences.documents[start:stop]

        def job(timeline: Timeline) -> None:
            positions = self._sequences.positions(start, stop)
            with self._claims.pop(group):  # freed also when it fails: another worker may be able to write it
                try:
                    put_rows(self.writer, group, acts, tokens, documents, positions, timeline)
                except StorageFailed:
                    # Once the record has its name another worker may seal the store, and the folders leave their place.
                    if not self.writer.is_sealed():
                        raise

        return job

    def close(self) -> None:
        """Give up what was claimed and is not committed; nothing may be on its way to the disk any more."""
        while self._claims:
            self._claims.popitem()[1].close()


class Behind:
    """Threads that run jobs behind a bounded queue; see `write_behind`."""

    def __init__(self, timeline: Timeline, on_commit: Callable[[], None], threads: int = 1) -> None:
        self._timeline, self._on_commit = timeline, on_commit
        self._jobs: queue.Queue[Job | None] = queue.Queue(QUEUED_GROUPS)
        self._failed: list[BaseException] = []
        self._done, self._lock, self._threads, self._running = threading.Event(), threading.Lock(), threads, threads
        for _ in range(threads):
            threading.Thread(target=self._work, name="actstore-writer").start()

    def _work(self) -> None:
        mine = Timeline()
        while (job := self._jobs.get()) is not None:
            try:
                if not self._failed:
                    job(mine)
                    self._on_commit()
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread, and raised there
                self._failed.append(error)
        with self._lock:
            for name, seconds in mine.seconds.items():  # the mean of the threads
                self._timeline.seconds[name] = self._timeline.seconds.get(name, 0.0) + seconds / self._threads
            self._running -= 1
            (self._jobs.put(None) if self._running else self._done.set())

    def check(self) -> None:
        """Raise what a job raised; jobs queued behind it were not run."""
        if self._failed:
            raise self._failed[0]

    def put(self, job: Job) -> None:
        """Queue a job, waiting while the queue is full. Raises: as `check`."""
        self.check()
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait until all that was queued is done, however often somebody interrupts; interrupt only then."""
        interrupted: BaseException | None = None
        told = False
        while not self._done.is_set():
            try:
                if not told:
                    self._jobs.put(None)
                    told = True
                self._done.wait()
            except BaseException as error:  # noqa: BLE001 - raised below: locks must not be freed while a job writes
                interrupted = error
        if interrupted is not None:
            raise interrupted


@contextlib.contextmanager
def write_behind(timeline: Timeline, on_commit: Callable[[], None], threads: int = 1) -> Iterator[Behind]:
    """Run jobs in threads behind a bounded queue. What was queued is finished, also when the caller is interrupted."""
    behind = Behind(timeline, on_commit, threads)
    try:
        yield behind
    finally:
        with timeline.part("wait"):
            behind.finish()
    behind.check()
