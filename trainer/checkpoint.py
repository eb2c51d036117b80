"""A run on disk: safetensors and JSON, never pickle.

runs/<digest>/
  config.json        what the run is: configuration, store, content digest, the store's key (the lineage)
  environment.json   versions, device, threads; read by people only
  metrics.jsonl      one line a log interval; cut back to the checkpoint's length on resume
  checkpoints/       see `shards`
  sae.safetensors    the finished SAE, in the units of the store
  result.json        the seal: final numbers
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actstore import durable
from actstore.catalog import digests_in, discard, unique_digest
from actstore.digests import canonical_json, check_prefix, sha256_bytes, sha256_pieces
from actstore.errors import FormatError, StoreNotFound, UsageError
from actstore.key import store_digest
from actstore.limits import MAX_CONFIG_BYTES, MAX_KEY_BYTES
from actstore.reader import Store
from trainer.architectures import load_architecture
from trainer.config import SaeConfig, config_json, parse_config, run_digest
from trainer.sae import SparseAutoencoder, Widths, tensors_of
from trainer.saved import About, OtherStore, Result, read_record, read_tensors, tensor_pieces
from trainer.sources import Sources, aligned


def runs_folder(runs: Path | str | None = None) -> Path:
    """Return the folder of runs: the argument, else $ACTSTORE_RUNS, else ./runs.

    Example:
        >>> runs_folder("/data/runs")
        PosixPath('/data/runs')
    """
    return Path(runs or os.environ.get("ACTSTORE_RUNS") or "runs")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its folder and what it is.

    Args:
        path: its folder, named by the run digest.
        config: the resolved configuration.
        store: digest of the store it was trained on.
        content_digest: of that store's rows.
        d_model: width of a row.
        key: the store's key, as JSON values.
        model: the model's name, for people and exports.
        others: the row-aligned stores besides, of a crosscoder or transcoder.
        result: final numbers, or None while it is unfinished.
    """

    path: Path
    config: SaeConfig
    store: str
    content_digest: str
    d_model: int
    key: dict[str, Any]
    model: str
    others: tuple[OtherStore, ...]
    result: dict[str, Any] | None

    @property
    def digest(self) -> str:
        """The run digest."""
        return self.path.name

    @property
    def widths(self) -> Widths:
        """Widths of the rows it encodes and reconstructs."""
        targets = tuple(o.d_model for o in self.others if o.role == "target")
        return Widths((self.d_model, *(o.d_model for o in self.others if o.role == "input")), targets or None)

    @property
    def kind(self) -> str:
        """What it is by its stores: "sae", "crosscoder", "transcoder" or "skip_transcoder"."""
        kind = self.widths.kind
        return f"skip_{kind}" if self.config.skip and kind == "transcoder" else kind

    @property
    def label(self) -> str:
        """A short name, for charts and tables."""
        c = self.config
        return f"{c.arch} n={c.n_latents} k={c.k} seed={c.seed} ({self.digest[:8]})"

    @property
    def model_name(self) -> str:
        """The model's name on the hub, else the one it was captured under."""
        return self.key["model"]["name"] or self.model

    @property
    def held_out(self) -> dict[str, Any]:
        """What the fit measured on held-out rows; empty while it is unfinished, and without such rows."""
        found: dict[str, Any] = (self.result or {}).get("held_out", {})
        return found

    def finished(self) -> dict[str, Any]:
        """Return the result. Raises: StoreNotFound: the run is unfinished."""
        if self.result is None:
            do = "run its `trainer fit` again: it goes on where it stopped"
            raise StoreNotFound("the run is not finished", str(self.path), do)
        return self.result

    def lock(self, what: str, *, shared: bool = False, wait: bool = False) -> AbstractContextManager[None]:
        """Return the lock of whoever writes into the run; `what` says what for. See `durable.lock`."""
        return _lock(self.path, what, shared=shared, wait=wait)

    def write(self, name: str, content: Any) -> None:
        """Commit a JSON file of the run, in place of one that is there. Raises: DiskFull, StorageFailed."""
        durable.write_new(self.path, name, [canonical_json(content)], replace=True)


def _lock(path: Path, what: str, *, shared: bool = False, wait: bool = False) -> AbstractContextManager[None]:
    holder = f"{what}, pid {os.getpid()} on {socket.gethostname()}"
    return durable.lock(path.parent / ".locks" / f"{path.name}.lock", holder, shared=shared, wait=wait)


def create_run(runs: Path, config: SaeConfig, sources: Sources) -> Run:
    """Make a run's folder, or open the one that is there."""
    store, others = sources.first, _others(sources)
    digest = run_digest(config, content_of(sources))
    path = runs / digest
    if not (path / "config.json").exists():
        durable.make_dir(path / "checkpoints")
        content = {
            "format": 1,
            "config": config_json(config),
            "store": store.digest,
            "content_digest": store.content_digest,
            "d_model": store.d_model,
            "key": store.key.model_dump(),
            "model": str(store.manifest.provenance.get("model", "")),
        }
        if others:
            content["others"] = [other.model_dump() for other in others]
        durable.write_new(path, "config.json", [canonical_json(content)], replace=True)
    return read_run(path)


def _others(sources: Sources) -> tuple[OtherStore, ...]:
    roles: list[tuple[Literal["input", "target"], Store]] = [("input", s) for s in sources.inputs[1:]]
    roles += [("target", s) for s in sources.targets or ()]
    return tuple(
        OtherStore(role=role, store=s.digest, content_digest=s.content_digest, d_model=s.d_model, key=s.key) for role, s in roles
    )


def content_of(sources: Sources) -> str:
    """Return the digest of all rows of row-aligned stores: of a single store its content digest."""
    return _content(sources.first.content_digest, _others(sources))


def _content(content_digest: str, others: tuple[OtherStore, ...]) -> str:
    """Return the digest of all rows: of a single store its own, else that of the list of roles and digests."""
    if not others:
        return content_digest
    return sha256_bytes(canonical_json([["input", content_digest], *([o.role, o.content_digest] for o in others)]))


def read_run(path: Path) -> Run:
    """Open a run's folder. Raises: FormatError: not a run, or its parts disagree."""
    try:
        about = read_record(About, path, "config.json", MAX_KEY_BYTES)
    except FileNotFoundError as error:
        raise FormatError("the run has no config.json", where=str(path)) from error
    try:
        config = parse_config(about.config, SaeConfig, str(path / "config.json"))
    except UsageError as error:
        raise FormatError(error.what, where=str(path)) from error
    others = tuple(about.others)
    if run_digest(config, _content(about.content_digest, others)) != path.name:
        raise FormatError("the run's config does not hash to its folder's name", where=str(path))
    if any(store_digest(key) != digest for key, digest in ((about.key, about.store), *((o.key, o.store) for o in others))):
        raise FormatError("config.json: the key is not that of the store", where=str(path))
    try:
        result = read_record(Result, path, "result.json", MAX_CONFIG_BYTES).model_dump()
    except FileNotFoundError:
        result = None
    key = about.key.model_dump()
    return Run(path, config, about.store, about.content_digest, about.d_model, key, about.model, others, result)


def run_sources(run: Run, open_store: Callable[[str], Store]) -> Sources:
    """Return the stores a run was trained on. Raises: what `open_store` does; UsageError: they are not row-aligned."""
    roles: dict[str, list[Store]] = {"input": [open_store(run.store)], "target": []}
    for other in run.others:
        roles[other.role].append(open_store(other.store))
    return aligned(roles["input"], roles["target"])


def list_runs(runs: Path | str | None = None, on_damage: Callable[[FormatError], None] | None = None) -> list[Run]:
    """Return every run of a folder, finished or not, sorted by digest.

    Args:
        runs: folder of runs; default $ACTSTORE_RUNS, else ./runs.
        on_damage: told of each run that cannot be read; without it the first such run raises.

    Raises: FormatError: a run cannot be read and `on_damage` is None. StorageFailed.
    """
    folder, found = runs_folder(runs), []
    for digest in digests_in(folder):
        try:
            found.append(read_run(folder / digest))
        except FormatError as error:
            if on_damage is None:
                raise
            on_damage(error)
    return found


def open_run(run: str | Path, runs: Path | str | None = None) -> Run:
    """Return the run at a path, or the only one with a prefix; see `find_run`."""
    return read_run(Path(run)) if isinstance(run, Path) or "/" in run else find_run(run, runs)


def find_run(prefix: str, runs: Path | str | None = None) -> Run:
    """Return the only run of a folder (default $ACTSTORE_RUNS, else ./runs) whose digest begins with `prefix`.

    Raises: UsageError: not a prefix, or ambiguous. StoreNotFound: none. FormatError: damaged.
    """
    return read_run(find_folder(prefix, runs_folder(runs)))


def find_folder(prefix: str, runs: Path) -> Path:
    """Return the folder of the only run whose digest begins with `prefix`, unread. Raises: UsageError, StoreNotFound."""
    check_prefix(prefix)
    return runs / unique_digest(digests_in(runs), prefix, "run", runs, f"`trainer ls --runs {runs}` lists the runs")


def remove_run(path: Path) -> None:
    """Remove a run's folder, whatever state it is in: out of the listing first, so that half a run is never read.

    Raises: StoreLocked: a fit holds it. StorageFailed.
    """
    with _lock(path, "a removal"):
        discard(path, path.parent / ".trash" / path.name)


def tensor_shapes(config: SaeConfig, widths: Widths) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor of an SAE; nothing is allocated. Raises: UsageError: as `new_sae`."""
    with torch.device("meta"):
        return {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(new_sae(config, widths)).items()}


def new_sae(config: SaeConfig, widths: Widths) -> SparseAutoencoder:
    """Return an SAE of a configuration, parameters not set. Raises: UsageError: no such architecture, or not its options."""
    return load_architecture(config.arch)(config, widths)


def finish_run(run: Run, sae: SparseAutoencoder | dict[str, Tensor], result: dict[str, Any]) -> None:
    """Write the finished SAE, or its tensors, then the result that seals the run, then drop the checkpoints."""
    tensors = sae if isinstance(sae, dict) else tensors_of(sae)
    data = tensor_pieces({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    durable.write_new(run.path, "sae.safetensors", data, replace=True)
    if (run.path / "metrics.jsonl").exists():
        durable.sync_file(run.path / "metrics.jsonl")
    run.write("result.json", {**result, "sae_sha256": sha256_pieces(data)})
    durable.remove_tree(run.path / "checkpoints")
    durable.remove_tree(run.path / "tmp")


def load_sae(run: str | Path, runs: Path | str | None = None) -> SparseAutoencoder:
    """Load the SAE of a finished run, ready to `encode` and `decode` rows as the store has them.

    Args:
        run: a unique prefix of its digest, or the path of its folder.
        runs: folder of runs; default $ACTSTORE_RUNS, else ./runs.

    Raises: StoreNotFound: no such run, or it is unfinished. FormatError: a file is damaged.
    """
    found = open_run(run, runs)
    result = found.finished()
    try:
        shapes = tensor_shapes(found.config, found.widths)
    except UsageError as error:
        raise FormatError(error.what, where=str(found.path)) from error
    tensors = read_tensors(found.path, "sae.safetensors", shapes, result["sae_sha256"])
    sae = new_sae(found.config, found.widths)  # after the file has shown that it has this size
    with torch.no_grad():
        for name, tensor in tensors_of(sae).items():
            tensor.copy_(tensors[name])
    return sae.eval()
