"""The order of rows in training, in closed form.

A pure function (shuffle seed, epoch, position) -> row, so any step is resumed from two integers and every number of
ranks sees the same global batch. Rows are cut into blocks; a keyed Feistel bijection permutes the blocks; consecutive
permuted blocks form a window whose rows are permuted again (../shared/research/store.md, section 3).

Sources: Luby and Rackoff 1988 (Feistel networks are permutations); Black and Rogaway 2002 (cycle walking);
Steele, Lea, Flood 2014 (splitmix64's finaliser as the round function).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from actstore.limits import MIB
from trainer.config import SaeConfig
from trainer.kernels.compiled import OPTIONS, mix

Int64 = npt.NDArray[np.int64]
BLOCK_BYTES = 256 << 10  # of contiguous rows: full speed on an SSD, and well below a document of most corpora
WINDOW_BYTES = 512 * MIB  # of one window; two are held
LANES = 8  # fixed, so that 1, 2, 4 or 8 ranks serve the same global batches
_MASK64 = (1 << 64) - 1


@njit(**OPTIONS)
def walk(
    positions: npt.NDArray[np.int64], n: int, keys: npt.NDArray[np.uint64], half: np.uint64, out: npt.NDArray[np.int64]
) -> None:
    """Write where a Feistel network of some rounds sends each position, walking on while it leaves [0, n).

    Args:
        positions: (m,) int64 in [0, n).
        n: size of the domain, at most 2^(2 half).
        keys: (rounds,) uint64.
        half: bits of half a position.
        out: (m,) int64, written.
    """
    mask = (np.uint64(1) << half) - np.uint64(1)
    for i in range(len(positions)):
        at = np.uint64(positions[i])
        while True:
            low, high = at & mask, at >> half
            for r in range(len(keys)):
                low, high = high ^ (mix(low + keys[r]) & mask), low
            at = (high << half) | low
            if at < np.uint64(n):
                break
        out[i] = np.int64(at)


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

    Example:
        >>> expected, ideal = companions(Order(100_000, block=8, window=64, seed=0), batch_size=128, rows_per_document=50.0)
        >>> round(expected, 3), round(ideal, 3)
        (1.793, 0.062)
    """
    length, n = max(rows_per_document, 1.0), max(order.rows, 2)
    window = min(order.window_rows, n)
    near = min(order.block, length) if window < n else length
    inside = (near - 1) / max(window - 1, 1)
    across = (length - near) / (n - 1)
    return (batch_size - 1) * (inside + across), (batch_size - 1) * (length - 1) / (n - 1)
