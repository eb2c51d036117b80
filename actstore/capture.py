"""The phase-1 pipeline: one pass of the model feeds one store a hook point; repeating it resumes it.

Several processes may run the same capture at once when it was asked for with `workers`; see `fill`. A capture that
differs from a sealed store only in the number of rows takes the row groups they share from it; see `link`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore import durable
from actstore.backends import Backend, load_backend
from actstore.corpus import ReadReport, find_files, identify_dataset, identify_files, read_documents
from actstore.errors import CorpusError, StoreDamaged, StoreLocked
from actstore.fill import fill
from actstore.key import HubCorpus, LocalCorpus, StoreKey, store_digest
from actstore.layout import StorePaths, stores_folder
from actstore.link import link_group, linkable, sources_for
from actstore.pipeline import Collector
from actstore.plan import Plan, make_plan
from actstore.reader import Store
from actstore.request import CaptureRequest, make_keys
from actstore.seal import seal_once
from actstore.sequences import Sequences, make_sequences, tokenized
from actstore.writer import StoreWriter, is_sealed, open_writer, writing

__all__ = ["CaptureRequest", "Derivation", "Plan", "Progress", "capture", "derive"]


@dataclass(slots=True)
class Progress:
    """What a capture reports to its caller while it runs; the caller prints, the library does not.

    Args:
        on_plan: called once, before the model is loaded.
        on_rows: called with the rows just computed, in every batch; also with rows found committed or linked.
        on_note: called with a line worth telling.
    """

    on_plan: Callable[[Plan], None] = field(default=lambda plan: None)
    on_rows: Callable[[int], None] = field(default=lambda rows: None)
    on_note: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True, slots=True)
class Derivation:
    """A request made definite: the model opened, the corpus identified, the keys known.

    Args:
        request: what was asked for.
        backend: the model, its weights not loaded.
        corpus: identity of the corpus.
        files: its local files.
        keys: the store key of each hook point, in the order asked for.
        per_batch: sequences of one batch of the model.
    """

    request: CaptureRequest
    backend: Backend
    corpus: LocalCorpus | HubCorpus
    files: list[Path]
    keys: list[StoreKey]
    per_batch: int

    def sequences(self, report: ReadReport) -> Sequences:
        """Read, tokenize and cut the corpus, counting into `report`. Raises: CorpusError: also when it changed."""
        key = self.keys[0]
        documents = read_documents(self.corpus, self.files, key.text_field, key.bad_lines, key.max_documents, report)
        rows = None if key.rows == "all" else key.rows
        stream = tokenized(documents, self.backend.tokenize, self.backend.vocabulary_size)
        bos = self.backend.bos if key.sequences.bos else None
        sequences = make_sequences(stream, key.sequences, bos, rows, self.per_batch)
        if isinstance(self.corpus, LocalCorpus) and identify_files(self.files) != self.corpus:
            where = ", ".join(map(str, self.files[:3]))
            raise CorpusError("the corpus changed while it was read", where, "run the command again")
        return sequences


def derive(request: CaptureRequest) -> Derivation:
    """Open the model, identify the corpus and make the keys; loads no weights. Raises: UsageError, CorpusError."""
    files = find_files(list(request.corpus))
    backend = load_backend(request.backend, request.model, request.revision, request.compute_dtype, request.device)
    if request.dataset:
        corpus: LocalCorpus | HubCorpus = identify_dataset(
            request.dataset, request.dataset_config, request.split, request.dataset_revision
        )
    else:
        corpus = identify_files(files)
    keys = make_keys(request, backend, corpus)
    per_batch = max(1, (request.batch_tokens or default_batch_tokens(backend.device)) // request.seq_len)
    return Derivation(request, backend, corpus, files, keys, per_batch)


def capture(request: CaptureRequest, progress: Progress | None = None, dry_run: bool = False) -> list[str]:
    """Capture every hook point of a request into its own store; finished stores cost nothing, started ones resume.

    Args:
        request: what to capture.
        progress: callbacks for a plan and for rows.
        dry_run: stop after the plan.

    Returns: the store digest of each hook point, in the order asked for.
    Raises: UsageError, CorpusError, KeyMismatch, NonFiniteActivation, StoreLocked, DiskFull, StorageFailed. Row groups
        committed before the error stay, and the same request goes on from them.
    """
    progress, stores = progress or Progress(), stores_folder(request.stores)
    derived = derive(request)
    digests = [store_digest(key) for key in derived.keys]
    todo = [key for key, digest in zip(derived.keys, digests, strict=True) if not StorePaths(stores, digest).sealed.is_dir()]
    if not todo:
        return digests
    widths = derived.backend.widths([key.hook for key in todo])
    paths = [StorePaths(stores, store_digest(key)) for key in todo]
    with contextlib.ExitStack() as locks:
        for one in [] if dry_run else paths:
            locks.enter_context(writing(one, request.workers > 1))
        report = ReadReport()
        sequences = derived.sequences(report)
        rows = sequences.rows if request.rows is None else request.rows
        writers = []
        for one, key, width in zip(paths, todo, widths, strict=True):
            dry = StoreWriter(one, key, rows, width)
            writers.append(dry if dry_run else open_writer(one, key, rows, width, request.workers > 1))
        writers = [writer for writer in writers if not is_sealed(writer)]  # by another worker, just now
        if writers:
            sources = [_sources(writer, stores, locks) for writer in writers]
            progress.on_plan(make_plan(writers, sources, derived.backend, sequences, rows, report, stores))
            if not dry_run:
                _run(derived, sequences, writers, sources, progress)
    return digests


def _sources(writer: StoreWriter, stores: Path, locks: contextlib.ExitStack) -> list[Store]:
    """Return the stores to share row groups with, each locked against removal until `locks` is closed."""
    found = []
    for source in sources_for(writer.key, writer.paths.digest, stores):
        with contextlib.suppress(StoreLocked):  # it is being removed or repaired
            locks.enter_context(durable.lock(StorePaths(stores, source.digest).lock, "", shared=True))
            found.append(source)
    return found


def _run(
    derived: Derivation, sequences: Sequences, writers: list[StoreWriter], sources: list[list[Store]], progress: Progress
) -> None:
    """Fill all writers' stores in one pass over the sequences, and seal them."""
    start = time.monotonic()

    def share(of: list[Store]) -> Callable[[StoreWriter, int], bool]:
        def link(writer: StoreWriter, index: int) -> bool:
            for source in of:
                if linkable(writer, source, index):
                    try:
                        link_group(writer, source, index)
                    except StoreDamaged as error:
                        progress.on_note(f"row group {index} is computed, not shared: {error}")
                    else:
                        return True
            return False

        return link

    collectors = [Collector(w, sequences, share=share(of)) for w, of in zip(writers, sources, strict=True)]
    first = derived.request.rank / derived.request.workers
    fill(derived.backend, sequences, collectors, derived.per_batch, first, progress.on_rows)
    vocabulary = derived.backend.vocabulary()
    provenance = _provenance(derived, time.monotonic() - start)
    for writer in writers:
        seal_once(writer, {"tokens": vocabulary.tokens, "special": vocabulary.special}, provenance)


def default_batch_tokens(device: str) -> int:
    """Return the tokens of one model batch on a device: beyond these a CPU's caches or a GPU's cores gain nothing more."""
    return 4096 if device == "cpu" else 32768


def _provenance(derived: Derivation, elapsed_s: float) -> dict[str, Any]:
    """Return what is written beside the key for people to read; it decides nothing."""
    from importlib.metadata import PackageNotFoundError, version

    model, versions = derived.request.model, {}
    for package in ("actstore", "torch", "transformer_lens", "transformers", "tokenizers", "numpy", "zarr"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "device": derived.backend.device,
        "batch_tokens": derived.per_batch * derived.request.seq_len,
        "elapsed_s": round(elapsed_s, 3),
        "versions": versions,
    }
