"""Fill the missing row groups of one or several stores in one pass of the model, alone or beside other processes.

Batch b is the same sequences for all stores alike, so a row group is made of the same batches whether its capture was
interrupted or not, whoever computes it, and whatever other hook points were asked for. The work is divided into units
of rows that hold whole row groups of every store, and at least one batch; workers start at different units and claim
the row groups of each unit as they come to it, without any other coordination. A worker that dies loses its claims,
and another one, or the same command run again, computes what is missing.

The model is always one batch ahead: it is given the next batch before the rows of the last one are taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.backends import Backend, OutOfMemoryError
from actstore.errors import UsageError
from actstore.pipeline import Collector, Job, padded, write_behind
from actstore.progress import Progress, StoppedError
from actstore.sequences import Sequences
from actstore.writer import StoreWriter
from actstore.zarr_array import row_dtype

Rows = list[npt.NDArray[Any]]  # one array a hook point

WAIT_SECONDS = 0.5  # between two looks at what other workers hold


@dataclass(slots=True)
class _Batches:
    """The model's batches; the last two are kept, because two units may share one."""

    backend: Backend
    sequences: Sequences
    writers: list[StoreWriter]
    progress: Progress
    parts: int = 1  # a batch is run in so many parts, since the device ran out of memory
    _launched: dict[int, list[Callable[[], Rows]]] = field(default_factory=dict)  # the parts of each

    def rows_of(self, batch: int) -> tuple[int, int]:
        """Return the rows [start, stop) of a batch."""
        first, last = self.sequences.batches[batch : batch + 2]
        return int(self.sequences.starts[first]), int(self.sequences.starts[last])

    def launch(self, batch: int) -> None:
        """Give a batch to the model."""
        if batch not in self._launched:
            first, last = (int(i) for i in self.sequences.batches[batch : batch + 2])
            with self.progress.timeline.part("model"):
                self._launched[batch] = self._run(first, last)
            for old in list(self._launched)[:-2]:
                del self._launched[old]

    def _run(self, first: int, last: int) -> list[Callable[[], Rows]]:
        """Run sequences [first, last); halve what is run at once for as long as the device has no memory for it."""
        while True:
            size = -(-(last - first) // self.parts)
            try:
                return [self._part(at, min(last, at + size)) for at in range(first, last, size)]
            except OutOfMemoryError as error:
                if size == 1:
                    raise UsageError(
                        f"a single sequence does not fit into the memory of {self.backend.device}: {error}",
                        do="use a shorter --seq-len, a narrower --compute-dtype, or a larger device",
                    ) from error
                self.parts *= 2
                self.progress.on_note(
                    f"{self.backend.device} is out of memory for {size} sequences at once: going on with {-(-size // 2)} "
                    f"(--batch-tokens sets it)"
                )

    def _part(self, first: int, last: int) -> Callable[[], Rows]:
        keys = [w.key for w in self.writers]
        # Centring is done with the full precision, before the conversion.
        dtypes = [self.backend.compute_dtype if key.center else row_dtype(key.dtype).name for key in keys]
        return self.backend.launch(*padded(self.sequences, first, last), [key.hook for key in keys], dtypes)

    def rows(self, batch: int) -> Rows:
        """Wait for a batch that was launched, and return each hook point's rows."""
        parts = [part() for part in self._launched[batch]]
        rows = parts[0] if len(parts) == 1 else [np.concatenate(of_hook) for of_hook in zip(*parts, strict=True)]
        self._launched[batch] = [lambda: rows]  # two units may share a batch: it is waited for once
        return rows


def fill(
    backend: Backend, sequences: Sequences, collectors: list[Collector], first: float = 0.0, progress: Progress | None = None
) -> None:
    """Compute, link or await every row group that the collectors are to fill; all are committed when this returns.

    Args:
        backend: runs the model.
        sequences: the corpus, cut, or being cut by another thread.
        collectors: one a store; all stores have the same rows.
        first: where to begin, as a fraction of the rows in [0, 1).
        progress: whom to tell, and to ask whether to stop.

    Raises: NonFiniteActivation, DiskFull, StorageFailed, CorpusError: row groups committed before it stay.
        StoppedError: `progress.stop` asked for it.
    """
    progress = progress or Progress()
    writers = [c.writer for c in collectors]
    largest, rows = max(w.group_rows for w in writers), writers[0].rows
    unit_rows = -(-min(rows, sequences.batch_tokens) // largest) * largest
    units = -(-rows // unit_rows)
    begin = int(first * units)
    pending, counted = [*range(begin, units), *range(begin)], set()
    try:
        with write_behind(progress.timeline, progress.on_commit, writers[0].threads) as behind:
            flow = _Flow(_Batches(backend, sequences, writers, progress), collectors, behind.put, progress)
            while pending:
                held = []
                for unit in pending:
                    start, stop = unit * unit_rows, min(rows, (unit + 1) * unit_rows)
                    behind.check()  # nobody waits for workers whose disks are full
                    if progress.stop():
                        flow.finish()
                        raise StoppedError
                    with progress.timeline.part("read"):
                        sequences.wait(stop)
                    for collector in collectors:
                        collector.claim(start, stop)
                    if flow.run(start, stop):
                        counted.add(unit)
                    if not all(c.has(start, stop) for c in collectors):
                        held.append(unit)
                    elif unit not in counted:
                        progress.on_rows(stop - start)
                flow.finish()
                if len(held) == len(pending):
                    with progress.timeline.part("wait"):
                        time.sleep(WAIT_SECONDS)  # the others are computing; one that dies frees its claims
                pending = held
    finally:
        for collector in collectors:
            collector.close()


@dataclass(slots=True)
class _Flow:
    """From the model to the collectors, one batch behind."""

    batches: _Batches
    collectors: list[Collector]
    put: Callable[[Job], None]
    progress: Progress
    _behind: tuple[int, int, int] | None = None  # a batch, and the rows of it that are to be taken

    def run(self, start: int, stop: int) -> bool:
        """Launch the batches of rows [start, stop) that hold claimed rows; return whether there were any."""
        found = any(c.wants(start, stop) for c in self.collectors)
        for batch in self.batches.sequences.batches_of(start, stop) if found else ():
            first, last = self.batches.rows_of(batch)
            low, high = max(first, start), min(last, stop)
            if any(c.wants(low, high) for c in self.collectors):
                self.batches.launch(batch)
                self.finish()
                self._behind = batch, low, high
            else:
                self.progress.on_rows(high - low)
        return found

    def finish(self) -> None:
        """Take the rows of the batch that was launched last."""
        if self._behind is not None:
            (batch, low, high), self._behind = self._behind, None
            first, _ = self.batches.rows_of(batch)
            with self.progress.timeline.part("model"):
                rows = self.batches.rows(batch)
            for collector, acts in zip(self.collectors, rows, strict=True):
                with self.progress.timeline.part("convert"):
                    full = collector.add(low, acts[low - first : high - first])
                with self.progress.timeline.part("wait"):
                    for job in full:
                        self.put(job)
            self.progress.on_rows(high - low)
