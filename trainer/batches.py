"""Which rows of a store are trained on, and how they get from there to each step's batch.

Windows of the order are read in file order by a thread, one ahead of the one in use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actstore.reader import Store
from trainer.config import Recipe
from trainer.distributed import ONE, Ranks
from trainer.feed import feed
from trainer.kernels.compiled import mix
from trainer.order import Int64, Order
from trainer.sources import Sources

HOLDOUT_KEY = 0x5EED_0F_D0C5  # which documents are held out depends on their index alone
_BATCHED_ROWS = 1 << 20  # rows of the documents and positions arrays looked at together


@dataclass(frozen=True, slots=True)
class Runs:
    """Sorted numbers of rows, held as runs of consecutive ones: 16 bytes a run, where the rows would take 8 each.

    Args:
        starts: (n,) int64, first row of each run.
        before: (n + 1,) int64, rows in the runs before each; the last is the number of all.

    Example:
        >>> runs = Runs.of([(0, np.array([True, False, True])), (3, np.array([True, False, True]))])
        >>> len(runs), runs[np.array([0, 1, 2, 3])].tolist()
        (4, [0, 2, 3, 5])
    """

    starts: Int64
    before: Int64

    @classmethod
    def of(cls, kept: Iterable[tuple[int, npt.NDArray[np.bool_]]]) -> Runs:
        """Return the rows kept: pairs of a first row and a mask of the rows from there on, in order."""
        edges = [first + np.flatnonzero(np.diff(mask, prepend=False, append=False)) for first, mask in kept]
        found = np.concatenate(edges).reshape(-1, 2)
        return cls(found[:, 0].copy(), np.concatenate([[0], np.cumsum(found[:, 1] - found[:, 0])]))

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.before[-1])

    def __getitem__(self, places: Int64) -> Int64:
        """Return the rows at some places, each in [0, len)."""
        run = np.searchsorted(self.before, places, side="right") - 1
        return self.starts[run] + (places - self.before[run])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all rows, (len,) int64."""
        return self[np.arange(len(self))].astype(dtype or np.int64, copy=False)


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of a store that are trained on and those held out, each sorted; None stands for all rows.

    Args:
        train: n rows, or None.
        held_out: (m,) int64.
        n_train: number of rows to train on.
        documents: documents in the store.
    """

    train: Runs | None
    held_out: Int64
    n_train: int
    documents: int


def split_rows(store: Store, config: Recipe) -> Split:
    """Split a store by document, leaving out masked rows on both sides.

    The held-out documents are those whose index hashes lowest: the same for every run on the store with this fraction.
    """
    documents = np.zeros(0, np.int32)
    for start in range(0, store.rows, _BATCHED_ROWS):
        documents = np.union1d(documents, store.read("documents", start, start + _BATCHED_ROWS))
    n_held = min(len(documents) - 1, max(1, round(len(documents) * config.holdout))) if config.holdout else 0
    ranks = mix(documents.astype(np.uint64) + np.uint64(HOLDOUT_KEY))
    held = documents[np.argsort(ranks, kind="stable")[:n_held]]
    special = np.array(store.vocabulary.special if config.exclude_special else [], np.int32)
    train: list[tuple[int, npt.NDArray[np.bool_]]] = []
    held_out = []
    for start in range(0, store.rows, _BATCHED_ROWS):
        stop = start + _BATCHED_ROWS
        kept = store.read("positions", start, stop) >= config.skip_positions
        if len(special):
            kept &= ~np.isin(store.read("tokens", start, stop), special)
        mine = np.isin(store.read("documents", start, stop), held)
        train.append((start, kept & ~mine))
        held_out.append(start + np.flatnonzero(kept & mine))
    rows = Runs.of(train)
    every = len(rows) == store.rows
    return Split(None if every else rows, np.concatenate(held_out), len(rows), len(documents))


class Window(NamedTuple):
    """Rows in memory, in file order, and the order to train on them.

    Args:
        rows: of each store, (n, d_model) in the stored dtype, in file order.
        places: (m,) int64, the place in `rows` of each row, in training order.
    """

    rows: tuple[npt.NDArray[Any], ...]
    places: Int64


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of a fit: step s gives rows [s B, (s + 1) B) of the epochs' orders, one after another.

    Args:
        sources: the stores.
        split: their rows to train on.
        order: their order.
        batch_size: rows of a step.
    """

    sources: Sources
    split: Split
    order: Order
    batch_size: int

    def window(self, epoch: int, index: int, memory: list[npt.NDArray[Any]], last: bool = True) -> Window:
        """Read a window in file order into memory, (window rows, d_model) a store; the next one is fetched from its bucket."""
        rows = self._rows(epoch, index)
        by_place = np.argsort(rows)
        places = np.empty_like(by_place)
        places[by_place] = np.arange(len(by_place))
        taken = (store.take("acts", rows[by_place], m[: len(rows)]) for store, m in zip(self.sources.stores, memory, strict=True))
        window = Window(tuple(taken), places)
        remote = [store for store in self.sources.stores if store.source is not None and not last]
        if remote:
            rows = self._rows(*self._after(epoch, index))
            for store in remote:
                store.want("acts", np.unique(rows // store.manifest.group_rows).tolist())
        return window

    def _rows(self, epoch: int, index: int) -> Int64:
        """Return the rows of a window in training order."""
        positions = self.order.rows_of_window(epoch, index)
        return positions if self.split.train is None else self.split.train[positions]

    def _after(self, epoch: int, index: int) -> tuple[int, int]:
        return (epoch, index + 1) if index + 1 < self.order.n_windows else (epoch + 1, 0)

    def iterate(
        self, first_step: int, rows: int, device: torch.device, scales: Sequence[float] = (1.0,), ranks: Ranks = ONE
    ) -> Iterator[list[Tensor]]:
        """Return an iterator over the batch of each step from `first_step` on, until `rows` rows are served in all.

        Args:
            first_step: where to begin.
            rows: of all steps together.
            device: where the batches are wanted.
            scales: what each store's rows are multiplied with.
            ranks: each takes every world-th row of a batch, from its own number on; of a short last batch perhaps none.

        Returns: (batch, d_model) float32 tensors, one a store, each valid until the next ones are asked for.
        """
        windows = self._windows(first_step * self.batch_size, rows)
        if ranks.world == 1:
            return feed(windows, self.batch_size, device, scales)
        size = len(range(ranks.rank, self.batch_size, ranks.world))
        mine = feed(self._taken(windows, ranks), size, device, scales)
        nothing = [torch.empty(0, s.d_model, device=device) for s in self.sources.stores]
        return itertools.chain(mine, [nothing] if 0 < rows % self.batch_size <= ranks.rank else [])

    def _taken(self, windows: Iterator[Window], ranks: Ranks) -> Iterator[Window]:
        """Yield a rank's rows of each window; the first window begins with a batch."""
        at = 0
        for rows, places in windows:
            in_batch = np.arange(at, at + len(places)) % self.batch_size
            yield Window(rows, places[in_batch % ranks.world == ranks.rank])
            at += len(places)

    def _windows(self, start: int, stop: int) -> Iterator[Window]:
        """Yield rows [start, stop) of the endless stream of epochs, window by window; the next one is read ahead."""
        epoch, offset = divmod(start, self.order.rows)
        index, skip = divmod(offset, self.order.window_rows)
        size = min(self.order.window_rows, self.order.rows)
        # Fresh pages for each window would cost as much as reading it.
        memories = [[np.empty((size, s.d_model), s.row_dtype) for s in self.sources.stores] for _ in range(2)]
        with ThreadPoolExecutor(1, "actstore-window") as reader:
            ahead = reader.submit(self.window, epoch, index, memories[0], start - skip + size >= stop)
            while start < stop:
                window = ahead.result()
                places = window.places[skip : skip + stop - start]
                start, skip = start + len(places), 0
                epoch, index = self._after(epoch, index)
                if start < stop:
                    memories.reverse()
                    ahead = reader.submit(self.window, epoch, index, memories[0], start + size >= stop)
                yield Window(window.rows, places)
