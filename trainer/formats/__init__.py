"""Formats an SAE is passed around in: the files beside this one, by name. Adding a format is adding a file.

Each has a function `export_sae(run, sae, out, open_sources)`. One that can be read too has `import_sae(folder)`, which
returns the parts of an SAE, or `import_run(folder, runs)`, where the folder says all that a run is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from actstore.errors import UsageError
from trainer.batches import split_rows
from trainer.checkpoint import Run, create_run, finish_run, load_sae
from trainer.exchange import HOLDOUT, build_sae
from trainer.memory import chosen_device
from trainer.metrics import measure
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources


def format_names(reading: bool = False) -> list[str]:
    """Return the names of all formats, or of those that can be imported.

    Example:
        >>> "saelens" in format_names()
        True
    """
    names = sorted(module.name for module in iter_modules(__path__))
    return [name for name in names if not reading or _can_import(_load(name))]


def _load(name: str) -> ModuleType:
    if name not in (module.name for module in iter_modules(__path__)):
        near = "".join(f"nearest: {known}; " for known in get_close_matches(name, format_names(), n=1))
        raise UsageError(f"no format {name!r}", do=f"{near}--format is one of {', '.join(format_names())}")
    return import_module(f"{__name__}.{name}")


def _can_import(module: ModuleType) -> bool:
    return hasattr(module, "import_sae") or hasattr(module, "import_run")


def _no_sources() -> Sources:
    raise UsageError("this format holds rows of the store too", do="pass open_sources")


def export_run(run: Run, name: str, out: Path, open_sources: Callable[[], Sources] = _no_sources) -> list[Path]:
    """Write a finished run's SAE in a format; return the files written.

    Args:
        run: the run.
        name: of the format.
        out: folder to write; empty or new.
        open_sources: opens the run's stores, for the formats that hold what latents are active on.

    Raises: UsageError: no such format, it cannot hold this SAE, or `out` holds files already. StoreNotFound: the run is
        unfinished.
    """
    module = _load(name)
    if out.exists() and any(out.iterdir()):
        raise UsageError("the output folder is not empty", str(out), "name another --out folder")
    written: list[Path] = module.export_sae(run, load_sae(run.path), out, open_sources)
    return written


def import_sae(folder: Path, name: str) -> SparseAutoencoder:
    """Read an SAE that another program wrote; nothing in the folder is executed.

    Args:
        folder: as the format wants it.
        name: of the format.

    Returns: an SAE whose config says, in `imported`, which files it comes from.
    Raises: UsageError: no such format. FormatError: the folder is not what the format requires, or nothing that our
        architectures can express.
    """
    module = _load(name)
    if not hasattr(module, "import_sae"):
        raise UsageError(f"format {name!r} is not read by this", do=f"--format is one of {', '.join(format_names(True))}")
    folder = folder.resolve()  # the folder itself may be a link; what is in it may not
    return build_sae(module.import_sae(folder), name, str(folder))


def import_run(
    folder: Path, name: str, runs: Path, sources: Sources | None = None, *, holdout: float = HOLDOUT, skip_positions: int = 0,
    device: str = "cpu",
) -> Run:  # fmt: skip
    """Make a finished run of an SAE that another program wrote, measured on rows of a store; repeating it is free.

    Args:
        folder, name: as `import_sae`.
        runs: folder of runs.
        sources: stores of the activations that the SAE reads and reconstructs; not needed for the format "actstore".
        holdout, skip_positions: which rows it is measured on: those that a fit with these options holds out.
        device: "auto", "cpu", "cuda" or "mps".

    Raises: as `import_sae`; UsageError: no store, or one of another width.
    """
    module = _load(name)
    if hasattr(module, "import_run"):
        found: Run = module.import_run(folder.resolve(), runs)
        return found
    sae = import_sae(folder, name)
    if sources is None:
        raise UsageError("the folder does not say which rows the SAE is of", str(folder), "name their store with --store")
    if sources.widths != sae.widths:
        raise UsageError(
            f"the store's rows have widths {sources.widths}, the SAE is of {sae.widths}",
            f"store {sources.first.digest[:12]}, {folder}",
            "name the store of the model and hook point that the SAE was trained on; a transcoder needs --target-store too",
        )
    run = create_run(runs, replace(sae.config, holdout=holdout, skip_positions=skip_positions), sources)
    if run.result is None:
        with run.lock("an import"):
            finish_run(run, sae, _measured(sae, sources, run, device))
    return create_run(runs, run.config, sources)


def _measured(sae: SparseAutoencoder, sources: Sources, run: Run, device: str) -> dict[str, Any]:
    """Return the result of an imported run: it saw none of our rows."""
    held_out = split_rows(sources.first, run.config).held_out
    where = chosen_device(device)
    numbers = measure(sae.to(where), sources, held_out, where).numbers() if len(held_out) else {}
    nothing = {"rows_seen": 0, "train": {}, "dead_fraction": None, "dead_window_rows": 0}
    return {"format": 1, **nothing, "held_out": numbers}
