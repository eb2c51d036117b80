"""Row-aligned stores read together: what an SAE encodes, and what it reconstructs where that is something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actstore.errors import UsageError
from actstore.reader import Store
from trainer.sae import Batch, Widths

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Sources:
    """Stores whose row i is the same token of the same text.

    Args:
        inputs: encoded, side by side.
        targets: reconstructed, side by side; None for the inputs.
    """

    inputs: tuple[Store, ...]
    targets: tuple[Store, ...] | None = None

    @property
    def first(self) -> Store:
        """The store that tokens, documents and positions are read from."""
        return self.inputs[0]

    @property
    def stores(self) -> tuple[Store, ...]:
        """All stores, inputs first."""
        return self.inputs + (self.targets or ())

    @property
    def widths(self) -> Widths:
        """Widths of their rows."""
        targets = None if self.targets is None else tuple(s.d_model for s in self.targets)
        return Widths(tuple(s.d_model for s in self.inputs), targets)

    @property
    def rows(self) -> int:
        """Rows of each."""
        return self.first.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory, of all stores together."""
        return sum(s.d_model * s.row_dtype.itemsize for s in self.stores)

    @property
    def chunk_rows(self) -> int:
        """Rows of the longest row group; a multiple of the others', which are powers of two as well."""
        return max(s.manifest.group_rows for s in self.stores)

    def take(self, rows: npt.NDArray[np.int64], device: torch.device | str = "cpu") -> Batch:
        """Return some rows as float32, in the units of the stores; `rows` is sorted int64."""
        parts = [to_tensor(s.take("acts", rows)).to(device, torch.float32) for s in self.stores]
        return joined(parts, len(self.inputs))


def as_sources(stores: Store | Sources) -> Sources:
    """Return a single store as sources; sources stay what they are."""
    return stores if isinstance(stores, Sources) else Sources((stores,))


def joined(parts: list[Tensor], n_inputs: int) -> Batch:
    """Return the batch of one tensor a store: inputs side by side, then targets side by side, if there are any.

    Example:
        >>> x, y = joined([torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(3, 4)], n_inputs=2)
        >>> x.shape, y.shape
        (torch.Size([3, 7]), torch.Size([3, 4]))
    """
    x = parts[0] if n_inputs == 1 else torch.cat(parts[:n_inputs], dim=1)
    rest = parts[n_inputs:]
    return Batch(x, x if not rest else rest[0] if len(rest) == 1 else torch.cat(rest, dim=1))


def aligned(inputs: list[Store], targets: list[Store] | None = None) -> Sources:
    """Return stores as sources, after looking at every row's token, document and position.

    Raises: UsageError: two stores are not row-aligned.
    """
    sources = Sources(tuple(inputs), None if not targets else tuple(targets))
    for other in sources.stores[1:]:
        if (difference := _difference(sources.first, other)) is not None:
            raise UsageError(
                f"the stores are not of the same text: {difference}", f"stores {sources.first.digest[:12]}, {other.digest[:12]}",
                "capture all hook points in one pass: `actstore capture --hook A --hook B`",
            )  # fmt: skip
    return sources


def _difference(one: Store, other: Store) -> str | None:
    if one.rows != other.rows:
        return f"{one.rows} and {other.rows} rows"
    for start in range(0, one.rows, _ROWS_AT_ONCE):
        for array in ("documents", "positions", "tokens"):
            different = np.flatnonzero(np.not_equal(*(s.read(array, start, start + _ROWS_AT_ONCE) for s in (one, other))))
            if len(different):
                return f"row {start + different[0]} has other {array}"
    return None


def to_tensor(rows: npt.NDArray[Any]) -> Tensor:
    """Return rows of any stored dtype as a tensor; bfloat16 bit for bit. The memory may be shared: never write to it.

    Example:
        >>> to_tensor(np.array([[1.0, 2.0]], np.float16)).dtype
        torch.float16
    """
    rows = np.ascontiguousarray(rows)
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
