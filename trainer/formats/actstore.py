"""Our own format: the folder of a finished run, which is all there is to it.

DIR/<run digest>/ with config.json, result.json, sae.safetensors, and metrics.jsonl and environment.json where the run has
them; so DIR is a folder of runs (`trainer ls --runs DIR`), and importing is copying a run that has been checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from actstore import durable
from actstore.catalog import digests_in
from actstore.errors import FormatError
from actstore.files import read_bounded
from actstore.limits import MAX_CONFIG_BYTES, MAX_KEY_BYTES, MAX_METRICS_BYTES
from trainer.checkpoint import Run, load_sae, read_run
from trainer.sae import SparseAutoencoder, tensors_of
from trainer.saved import tensor_pieces
from trainer.sources import Sources

# The seal comes last: a copy that stops half-way is an unfinished run.
FILES = {
    "config.json": MAX_KEY_BYTES, "environment.json": MAX_CONFIG_BYTES, "metrics.jsonl": MAX_METRICS_BYTES,
    "result.json": MAX_CONFIG_BYTES,
}  # fmt: skip


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the run's folder below `out`."""
    target = out / run.digest
    durable.make_dir(target)
    data = tensor_pieces({name: tensor.detach() for name, tensor in tensors_of(sae).items()})
    durable.write_new(target, "sae.safetensors", data, replace=True)
    written = [target / "sae.safetensors"]
    for name, limit in FILES.items():
        try:
            durable.write_new(target, name, [read_bounded(run.path, name, limit)], replace=True)
        except FileNotFoundError:
            continue
        written.append(target / name)
    durable.remove_tree(target / "tmp")
    return written


def import_run(folder: Path, runs: Path) -> Run:
    """Copy a finished run into a folder of runs, after reading all of it; one that is there already stays.

    Args:
        folder: the run's folder, or a folder with nothing but it.
        runs: folder of runs.

    Raises: FormatError: not a run, or damaged. StoreNotFound: it is unfinished.
    """
    if not (folder / "config.json").exists():
        found = digests_in(folder)
        if len(found) != 1:
            raise FormatError(f"{len(found)} runs in the folder, one is needed", str(folder), "name the folder of one run")
        folder = folder / found[0]
    run = read_run(folder)
    sae = load_sae(folder)
    there = replace(run, path=runs / run.digest)
    with there.lock("an import"):
        if not (there.path / "result.json").exists():
            export_sae(run, sae, runs, lambda: Sources(()))
    return read_run(there.path)
