"""Which rows a step trains on, in closed form, and how they get from the store to the batch.

A pure function (shuffle seed, epoch, position) -> row, so any step is resumed from two integers and every number of
ranks sees the same global batch. Rows are cut into blocks; a keyed Feistel bijection permutes the blocks; consecutive
permuted blocks form a window whose rows are permuted again (../shared/research/store.md, section 3). Windows are read
in file order by a thread, one ahead of the one in use.

Sources: Luby and Rackoff 1988 (Feistel networks are permutations); Black and Rogaway 2002 (cycle walking);
Steele, Lea, Flood 2014 (splitmix64's finaliser as the round function).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actstore.limits import MIB
from actstore.reader import Store
from trainer.config import FitConfig, SaeConfig
from trainer.distributed import ONE, Ranks
from trainer.feed import feed
from trainer.gather import Runs, mix, walk
from trainer.sources import Sources

Int64 = npt.NDArray[np.int64]
BLOCK_BYTES = 256 << 10  # of contiguous rows: full speed on an SSD, and well below a document of most corpora
WINDOW_BYTES = 512 * MIB  # of one window; two are held
LANES = 8  # fixed, so that 1, 2, 4 or 8 ranks serve the same global batches
HOLDOUT_KEY = 0x5EED_0F_D0C5  # which documents are held out depends on their index alone
_MASK64 = (1 << 64) - 1
_BATCHED_ROWS = 1 << 20  # rows of the documents and positions arrays looked at together


def _key(*parts: int) -> int:
    """Derive a 64-bit key from integers."""
    key = 0x9E3779B97F4A7C15
    for part in parts:
        key = int(mix(np.uint64((key ^ (part * 0xD1342543DE82EF95)) & _MASK64)))
    return key


def permute(positions: Int64, n: int, key: int) -> Int64:
    """Return where a keyed bijection of [0, n) sends each position; O(len(positions)) time and memory, whatever n is.

    Args:
        positions: (m,) int64, each in [0, n).
        n: size of the domain.
        key: 64-bit key.

    Example:
        >>> sorted(permute(np.arange(10), 10, key=7).tolist()) == list(range(10))
        True
    """
    if n <= 1:
        return np.zeros_like(positions)
    rounds = 12 if n < 4096 else 6  # few rounds are visibly uneven on tiny domains (measured: store.md, section 3)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.array([_key(key, r) for r in range(rounds)], np.uint64)
    out = np.empty_like(positions)
    walk(positions, n, keys, np.uint64(half), out)
    return out


@dataclass(frozen=True, slots=True)
class Order:
    """The order of `rows` positions in each epoch; see the module's first lines.

    Args:
        rows: how many positions.
        block: rows of a block.
        window: blocks of a window; a multiple of LANES.
        seed: shuffle seed.
    """

    rows: int
    block: int
    window: int
    seed: int

    @property
    def window_rows(self) -> int:
        """Rows of every window but the last."""
        return self.window * self.block

    @property
    def full_windows(self) -> int:
        """Windows of the regular kind; what is left of the rows forms one more."""
        return self.rows // self.block // self.window

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return self.full_windows + (self.rows > self.full_windows * self.window_rows)

    def rows_of_window(self, epoch: int, window: int) -> Int64:
        """Return the positions of a window in training order, (window rows,) int64."""
        lanes = [self._lane(epoch, window, lane) for lane in range(LANES)]
        out = np.empty(sum(map(len, lanes)), np.int64)
        for lane, rows in enumerate(lanes):  # a global batch takes the lanes in turn
            out[lane::LANES] = rows
        return out

    def _lane(self, epoch: int, window: int, lane: int) -> Int64:
        blocks, order = self.rows // self.block, _key(self.seed, epoch, 1)
        if window < self.full_windows:
            mine = permute(np.arange(window * self.window + lane, (window + 1) * self.window, LANES), blocks, order)
            inner = permute(np.arange(len(mine) * self.block), len(mine) * self.block, _key(self.seed, epoch, 2, window, lane))
            return mine[inner // self.block] * self.block + inner % self.block
        rest = self.rows - self.full_windows * self.window_rows
        inner = permute(np.arange(lane, rest, LANES), rest, _key(self.seed, epoch, 2, window))
        left = permute(np.arange(self.full_windows * self.window, blocks), blocks, order)
        in_blocks = inner < len(left) * self.block  # the odd rows of the last block follow the left-over blocks
        out = blocks * self.block + inner - len(left) * self.block
        out[in_blocks] = left[inner[in_blocks] // self.block] * self.block + inner[in_blocks] % self.block
        return out


def make_order(rows: int, row_bytes: int, config: SaeConfig, chunk_rows: int) -> Order:
    """Return the order for a store: windows of at most WINDOW_BYTES ("exact": one) of blocks of about BLOCK_BYTES.

    With "chunks" a block is `chunk_rows` rows, a row group: what a bucket or a spinning disk reads at a time.
    """
    block = 1 << max(0, (BLOCK_BYTES // row_bytes).bit_length() - 1)
    block = {"exact": 1, "chunks": min(chunk_rows, rows)}.get(config.shuffle, block)
    blocks = rows if config.shuffle == "exact" else WINDOW_BYTES // (block * row_bytes)
    return Order(rows, block, max(LANES, -(-blocks // LANES) * LANES), config.shuffle_seed)


def companions(order: Order, batch_size: int, rows_per_document: float) -> tuple[float, float]:
    """Return (expected, ideal) number of other rows of its own document that a row has in its batch.

    Args:
        order: the order of rows.
        batch_size: rows of a batch.
        rows_per_document: mean rows of a document.

    Source: ../shared/research/store.md, section 3; equal to simulation within 1 %.
    """
    length, n = max(rows_per_document, 1.0), max(order.rows, 2)
    window = min(order.window_rows, n)
    near = min(order.block, length) if window < n else length
    inside = (near - 1) / max(window - 1, 1)
    across = (length - near) / (n - 1)
    return (batch_size - 1) * (inside + across), (batch_size - 1) * (length - 1) / (n - 1)


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


def split_rows(store: Store, config: FitConfig | SaeConfig) -> Split:
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
