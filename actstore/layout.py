"""Where things lie: names built from constants, digests and integers only, never from anything read or asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

KEY, MANIFEST, VOCABULARY, GROUP_METADATA = "key.json", "manifest.json", "vocabulary.json", "zarr.json"
GROUPS = "row_groups.bin"  # digests of the row groups, 32 bytes each, of a store with too many for its manifest
SPOOL = "spool"  # token ids of a hub stream, while it is captured
PLAN = "plan.json"  # rows and width of an unsealed store, for whoever looks at it; gone when it is sealed


def stores_folder(stores: Path | str | None = None) -> Path:
    """Return the folder of stores: the argument, else $ACTSTORE_STORES, else ./stores.

    Example:
        >>> stores_folder("elsewhere").name
        'elsewhere'
    """
    return Path(stores or os.environ.get("ACTSTORE_STORES") or "stores")


@dataclass(frozen=True, slots=True)
class StorePaths:
    """The places of one store.

    Args:
        stores: the folder of stores.
        digest: the store digest, 64 hexadecimal digits.

    Example:
        >>> StorePaths(Path("stores"), "ab" * 32).sealed.name[:4]
        'abab'
    """

    stores: Path
    digest: str

    @property
    def sealed(self) -> Path:
        """The folder of the sealed store."""
        return self.stores / self.digest

    @property
    def staging(self) -> Path:
        """The folder of the unsealed store, while it is captured or after its capture stopped."""
        return self.stores / ".staging" / self.digest

    @property
    def trash(self) -> Path:
        """Where a removed store goes before its files are deleted."""
        return self.stores / ".trash" / self.digest

    @property
    def lock(self) -> Path:
        """The lock file: shared for readers and for captures that share the work, exclusive for everything else."""
        return self.stores / ".locks" / f"{self.digest}.lock"

    @property
    def claims(self) -> Path:
        """The folder of lock files by which captures of one store divide its row groups between them."""
        return self.stores / ".locks" / f"{self.digest}.claims"

    def claim(self, group: int | None) -> Path:
        """Return the lock file of one row group; of None, that of setting up and of sealing."""
        return self.claims / ("store.lock" if group is None else f"{group}.lock")

    @property
    def scratch(self) -> StorePaths:
        """The place where a repair computes row groups again, before they are accepted."""
        return StorePaths(self.stores / ".repair", self.digest)


def arrays_of(dtype: str) -> tuple[str, ...]:
    """Return the arrays of a store by its stored dtype, each cut into the same row groups, one chunk file a row group.

    Example:
        >>> arrays_of("float16")
        ('acts', 'tokens', 'documents', 'positions')
        >>> arrays_of("int8")[4:]
        ('scale', 'columns', 'exact')
    """
    rows = ("acts", "tokens", "documents", "positions")
    return (*rows, "scale", "columns", "exact") if dtype == "int8" else rows


def chunk_name(array: str, group: int) -> str:
    """Return the file of one chunk below a store's folder.

    Example:
        >>> chunk_name("acts", 17), chunk_name("tokens", 0), chunk_name("columns", 2)
        ('acts/c.17.0', 'tokens/c.0', 'columns/c.2.0.0')
    """
    return f"{array}/c.{group}" + {"acts": ".0", "columns": ".0.0"}.get(array, "")


def record_name(group: int) -> str:
    """Return the file of one row group's commit record below a store's folder.

    Example:
        >>> record_name(17)
        'row_groups/17.json'
    """
    return f"row_groups/{group}.json"


def metadata_name(array: str) -> str:
    """Return the file of one array's Zarr metadata below a store's folder.

    Example:
        >>> metadata_name("acts")
        'acts/zarr.json'
    """
    return f"{array}/{GROUP_METADATA}"
