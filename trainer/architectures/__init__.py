"""SAE architectures: the files beside this one, by name. Adding an architecture is adding a file with a class `Sae`."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, cast

from pydantic import TypeAdapter

from actstore.errors import UsageError
from trainer.config import FitConfig, Option, parse_config
from trainer.sae import SparseAutoencoder

KINDS = {  # what an SAE becomes by its stores, whatever its architecture
    "transcoder": "with --target-store HASH", "skip_transcoder": "with --target-store HASH --skip",
    "crosscoder": "with several --store HASH",
}  # fmt: skip


def architecture_names() -> list[str]:
    """Return the names of all architectures.

    Example:
        >>> "topk" in architecture_names()
        True
    """
    return sorted(module.name for module in iter_modules(__path__))


def full_name(name: str) -> str:
    """Return the name of an architecture as its papers or a beginning of it spell it: with hyphens, in any case.

    Raises: UsageError: no such one, or several begin so.

    Example:
        >>> full_name("matryoshka"), full_name("ReLU-L1"), full_name("topk")
        ('matryoshka_batchtopk', 'relu_l1', 'topk')
    """
    wanted, names = name.replace("-", "_").lower(), architecture_names()
    found = [known for known in names if known.startswith(wanted)] if wanted else []
    if wanted in names or len(found) == 1:
        return wanted if wanted in names else found[0]
    near = get_close_matches(wanted, names, n=1)
    do = (f"nearest: {near[0]}; " if near else "") + f"--arch is one of {', '.join(names)}"
    if wanted in KINDS:
        do = f"a {name} is any --arch (topk, batchtopk, relu_l1, …) {KINDS[wanted]}"
    raise UsageError(f"no architecture {name!r}" if not found else f"several architectures begin with {name!r}", do=do)


def load_architecture(name: str) -> type[SparseAutoencoder]:
    """Return the class of an architecture by its full name. Raises: UsageError: no such one.

    Example:
        >>> load_architecture("batchtopk").arch
        'batchtopk'
    """
    if (full := full_name(name)) != name:
        raise UsageError(f"no architecture {name!r}", do=f"the name is {full!r}")
    return cast(type[SparseAutoencoder], import_module(f"{__name__}.{name}").Sae)


def options_of(arch: str) -> dict[str, Any]:
    """Return the names and defaults of an architecture's own options.

    Example:
        >>> options_of("topk")
        {'multi_topk': False, 'k_annealing': 0.0}
    """
    return {f.name: f.default for f in fields(load_architecture(arch).Options)}


def chosen_options(config: FitConfig) -> dict[str, tuple[tuple[str, Option], ...]]:
    """Return for each architecture of a fleet those of the given options that it has and that are not at their default.

    Raises: UsageError: an option that none of them has, or a wrong value.
    """
    unknown, chosen = set(config.option), {}
    for arch in config.arch:
        defaults = options_of(arch)
        mine = {name: value for name, value in config.option.items() if name in defaults}
        unknown -= mine.keys()
        parsed = parse_config(mine, load_architecture(arch).Options, f"--option of {arch}")
        values = TypeAdapter(type(parsed)).dump_python(parsed)
        chosen[arch] = tuple(sorted((name, values[name]) for name in mine if values[name] != defaults[name]))
    if unknown:
        known = "; ".join(f"{arch}: {', '.join(options_of(arch)) or 'none'}" for arch in config.arch)
        raise UsageError(f"no architecture of this fleet has the option {sorted(unknown)[0]!r}", do=f"--option is one of {known}")
    return chosen
