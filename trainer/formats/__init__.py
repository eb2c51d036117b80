"""Formats an SAE is passed around in: the files beside this one, by name. Each has a function `export_sae`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from actstore.errors import UsageError
from trainer.checkpoint import Run, load_sae


def format_names() -> list[str]:
    """Return the names of all formats.

    Example:
        >>> "saelens" in format_names()
        True
    """
    return sorted(module.name for module in iter_modules(__path__))


def export_run(run: Run, name: str, out: Path) -> list[Path]:
    """Write a finished run's SAE in a format; return the files written.

    Raises: UsageError: no such format, or `out` holds files already. StoreNotFound: the run is unfinished.
    """
    if name not in format_names():
        raise UsageError(f"no format {name!r}", do=f"--format is one of {', '.join(format_names())}")
    if out.exists() and any(out.iterdir()):
        raise UsageError("the output folder is not empty", str(out), "name another --out folder")
    written: list[Path] = import_module(f"{__name__}.{name}").export_sae(run, load_sae(run.path), out)
    return written
