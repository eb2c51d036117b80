"""Fill the missing row groups of one or several stores in one pass of the model, alone or beside other processes.

Batch b is sequences [b B, (b + 1) B) for all stores alike, so a row group is made of the same batches whether its
capture was interrupted or not, whoever computes it, and whatever other hook points were asked for. The work is
divided into units of rows that hold whole row groups of every store; workers start at different units and claim the
row groups of each unit as they come to it, without any other coordination. A worker that dies loses its claims, and
another one, or the same command run again, computes what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from actstore.backends import Backend
from actstore.pipeline import Collector, Job, padded, write_behind
from actstore.sequences import Sequences

OnRows = Callable[[int], None]
WAIT_SECONDS = 0.5  # between two looks at what other workers hold


@dataclass(slots=True)
class _Batches:
    """The model's batches; the last one is kept, because two units may share it."""

    backend: Backend
    sequences: Sequences
    per_batch: int
    hooks: list[str]
    _last: tuple[int, list[npt.NDArray[Any]]] = (-1, [])

    def of_rows(self, start: int, stop: int) -> range:
        """Return the batches that rows [start, stop) lie in."""
        first, last = self.sequences.covering(start, stop)
        return range(first // self.per_batch, (last - 1) // self.per_batch + 1)

    def span(self, batch: int) -> tuple[int, int]:
        """Return the sequences [first, last) of a batch."""
        return batch * self.per_batch, min(len(self.sequences.starts) - 1, (batch + 1) * self.per_batch)

    def activations(self, batch: int) -> list[npt.NDArray[Any]]:
        """Return each hook point's activations of a batch."""
        if self._last[0] != batch:
            tokens, lengths = padded(self.sequences, *self.span(batch))
            self._last = batch, self.backend.activations(tokens, lengths, self.hooks)
        return self._last[1]


def fill(
    backend: Backend,
    sequences: Sequences,
    collectors: list[Collector],
    per_batch: int,
    first: float,
    on_rows: Callable[[int], None],
) -> None:
    """Compute, link or await every row group that the collectors are to fill; all are committed when this returns.

    Args:
        backend: runs the model.
        sequences: the corpus, cut; the last batch complete.
        collectors: one a store; all stores have the same rows.
        per_batch: sequences of one batch of the model.
        first: where to begin, as a fraction of the rows in [0, 1).
        on_rows: called with the number of rows just computed, linked, or found committed.

    Raises: NonFiniteActivation, DiskFull, StorageFailed: row groups committed before it stay.
    """
    writers = [c.writer for c in collectors]
    unit_rows, rows = max(w.group_rows for w in writers), writers[0].rows
    units = -(-rows // unit_rows)
    begin = int(first * units)
    pending, counted = [*range(begin, units), *range(begin)], set()
    batches = _Batches(backend, sequences, per_batch, [w.key.hook for w in writers])
    try:
        with write_behind() as put:
            while pending:
                held = []
                for unit in pending:
                    start, stop = unit * unit_rows, min(rows, (unit + 1) * unit_rows)
                    for collector in collectors:
                        collector.claim(start, stop)
                    if _compute(batches, collectors, start, stop, put, on_rows):
                        counted.add(unit)
                    if not all(c.has(start, stop) for c in collectors):
                        held.append(unit)
                    elif unit not in counted:
                        on_rows(stop - start)
                if len(held) == len(pending):
                    time.sleep(WAIT_SECONDS)  # the others are computing; one that dies frees its claims
                pending = held
    finally:
        for collector in collectors:
            collector.close()


def _compute(
    batches: _Batches,
    collectors: list[Collector],
    start: int,
    stop: int,
    put: Callable[[Job], None],
    on_rows: Callable[[int], None],
) -> bool:
    """Run the batches of rows [start, stop) that hold claimed rows; return whether there were any."""
    if not any(c.wants(start, stop) for c in collectors):
        return False
    starts = batches.sequences.starts
    for batch in batches.of_rows(start, stop):
        first, last = (int(starts[i]) for i in batches.span(batch))
        low, high = max(first, start), min(last, stop)
        if any(c.wants(low, high) for c in collectors):
            for collector, acts in zip(collectors, batches.activations(batch), strict=True):
                collector.add(first, acts, put)
        on_rows(high - low)
    return True
