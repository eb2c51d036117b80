"""Every error a user can meet: what happened, where, what to do, and the exit code (reliability.md, section 4)."""

from __future__ import annotations


class ActstoreError(Exception):
    """A fault with a name. `cli/output.py` prints it as three lines and exits with `exit_code`.

    Args:
        what: one sentence: what is wrong, with the value found and the value allowed.
        where: the path, line, rows or option it concerns; empty when `what` says it.
        do: the next command or action; empty when there is none.

    Example:
        >>> print(StoreNotFound("no store begins with 3fa9", where="./stores", do="`actstore ls` lists the stores"))
        no store begins with 3fa9
          where: ./stores
          do: `actstore ls` lists the stores
    """

    exit_code = 70

    def __init__(self, what: str, where: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  do: {self.do}")
        return "\n".join(lines)


class StoreDamaged(ActstoreError):
    """A chunk, record or folder of a sealed store differs from what its manifest says."""

    exit_code = 1


class UsageError(ActstoreError):
    """An option or argument that cannot be meant: found before anything is read or written."""

    exit_code = 2


class CorpusError(ActstoreError):
    """The corpus cannot be read as asked, is empty, too short, or changed while it was read."""

    exit_code = 3


class KeyMismatch(ActstoreError):
    """A store or run on disk was derived from something else than what is asked for now."""

    exit_code = 3


class NonFiniteActivation(ActstoreError):
    """The model gave NaN or Inf, or a value beyond the stored dtype's range."""

    exit_code = 3


class StoreLocked(ActstoreError):
    """Another process holds the store or run."""

    exit_code = 4


class StoreNotFound(ActstoreError):
    """No store or run has this digest."""

    exit_code = 5


class StoreNotSealed(ActstoreError):
    """The store is still being captured, or its capture stopped half-way."""

    exit_code = 5


class DiskFull(ActstoreError):
    """Not enough free space, found before the start or while writing."""

    exit_code = 6


class StorageFailed(ActstoreError):
    """The operating system refused a read, write, rename or sync."""

    exit_code = 6


class RankLost(ActstoreError):
    """Another process of the same fit ended, or does not answer in time."""

    exit_code = 6


class FormatError(ActstoreError):
    """A file is not what its format requires; nothing is guessed and nothing is executed."""

    exit_code = 7


class TrainingDiverged(ActstoreError):
    """The loss of an SAE is no longer finite."""

    exit_code = 8
