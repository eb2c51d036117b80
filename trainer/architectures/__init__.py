"""SAE architectures: the files beside this one, by name. Adding an architecture is adding a file with a class `Sae`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import cast

from actstore.errors import UsageError
from trainer.sae import SparseAutoencoder


def architecture_names() -> list[str]:
    """Return the names of all architectures.

    Example:
        >>> "topk" in architecture_names()
        True
    """
    return sorted(module.name for module in iter_modules(__path__))


def load_architecture(name: str) -> type[SparseAutoencoder]:
    """Return the class of an architecture. Raises: UsageError: no such one."""
    if name not in architecture_names():
        raise UsageError(f"no architecture {name!r}", do=f"--arch is one of {', '.join(architecture_names())}")
    return cast(type[SparseAutoencoder], import_module(f"{__name__}.{name}").Sae)
