"""The phase-1 pipeline: one pass of the model feeds one store a hook point; repeating it resumes it.

The model's batches are fixed once for all: batch b is sequences [b B, (b + 1) B). A row group takes its rows from the
batches it overlaps, so an interrupted capture recomputes exactly the same batches and ends at the same bytes. One
thread behind a bounded queue digests and writes, so that the model does not wait for the disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from actstore import durable
from actstore.backends import Backend, load_backend
from actstore.corpus import ReadReport, find_files, identify_dataset, identify_files, read_documents
from actstore.errors import CorpusError, DiskFull, UsageError
from actstore.key import HubCorpus, LocalCorpus, Packing, SequenceRule, StoreKey, store_digest
from actstore.layout import StorePaths, stores_folder
from actstore.limits import MAX_SEQ_LEN, MIN_FREE_BYTES, MIN_SEQ_LEN
from actstore.pipeline import Collector, batches, padded, write_behind
from actstore.sequences import Sequences, make_sequences, tokenized
from actstore.writer import StoreWriter, open_writer, seal, writing


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What to capture. Each field is an option of `actstore capture`; see its help for the meaning and units."""

    model: str
    hooks: tuple[str, ...]
    corpus: tuple[Path, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    text_field: str = "text"
    bad_lines: Literal["error", "skip"] = "error"
    max_documents: int | None = None
    seq_len: int = 128
    packing: Packing = "pack"
    bos: bool | None = None
    rows: int | None = None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    center: bool = False
    revision: str | None = None
    backend: str = "transformer_lens"
    device: str = "auto"
    batch_tokens: int | None = None
    stores: Path | None = None

    def __post_init__(self) -> None:
        if not self.hooks or len(set(self.hooks)) != len(self.hooks):
            raise UsageError("hook points must be named once each", ", ".join(self.hooks), "--hook blocks.12.hook_resid_pre")
        if bool(self.corpus) == bool(self.dataset):
            raise UsageError("exactly one of --corpus and --dataset must be given", do="--corpus FILE.jsonl")
        if not MIN_SEQ_LEN <= self.seq_len <= MAX_SEQ_LEN:
            raise UsageError(f"--seq-len {self.seq_len} is outside {MIN_SEQ_LEN} to {MAX_SEQ_LEN} tokens")
        for option in ("rows", "max_documents", "batch_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"--{option.replace('_', '-')} {value} must be at least 1")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture will write, known before any weight is loaded.

    Args:
        rows: rows of each store.
        sequences: sequences the model will run.
        documents, empty, bad: documents used, left out as empty, skipped as bad.
        stores: for each hook point its store digest, d_model, and bytes still to write.
        needed_bytes: bytes still to write in all.
        free_bytes: bytes free where the stores lie.
    """

    rows: int
    sequences: int
    documents: int
    empty: int
    bad: int
    stores: list[dict[str, Any]]
    needed_bytes: int
    free_bytes: int


@dataclass(slots=True)
class Progress:
    """What a capture reports to its caller while it runs; the caller prints, the library does not.

    Args:
        on_plan: called once, before the model is loaded.
        on_rows: called with the rows just computed, in every batch.
    """

    on_plan: Callable[[Plan], None] = field(default=lambda plan: None)
    on_rows: Callable[[int], None] = field(default=lambda rows: None)


def make_keys(request: CaptureRequest, backend: Backend, corpus: LocalCorpus | HubCorpus) -> list[StoreKey]:
    """Return the store key of each hook point.

    Raises: UsageError: BOS asked for and the tokenizer has none; sequences longer than the model's context; a value
        that no key can hold.
    """
    bos = backend.bos is not None if request.bos is None else request.bos
    if bos and backend.bos is None:
        raise UsageError("--bos was given, but the tokenizer has no BOS token", do="pass --no-bos")
    if backend.context is not None and request.seq_len > backend.context:
        raise UsageError(
            f"--seq-len {request.seq_len} is longer than the model's context of {backend.context} tokens",
            do=f"--seq-len {backend.context} or less",
        )
    dtype = backend.compute_dtype if request.dtype == "auto" else request.dtype
    shared = {
        "backend": backend.name,
        "attention": backend.attention,
        "model": backend.fingerprint(),
        "compute_dtype": backend.compute_dtype,
        "center": request.center,
        "corpus": corpus,
        "text_field": request.text_field,
        "bad_lines": request.bad_lines,
        "max_documents": request.max_documents,
        "tokenizer": backend.tokenizer_digest(),
        "sequences": SequenceRule(packing=request.packing, seq_len=request.seq_len, bos=bos),
        "dtype": dtype,
        "rows": request.rows or "all",
    }
    try:
        return [StoreKey.model_validate({**shared, "hook": hook}) for hook in request.hooks]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", do="see `actstore capture --help`") from error


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
    files = find_files(list(request.corpus))
    backend = load_backend(request.backend, request.model, request.revision, request.compute_dtype, request.device)
    if request.dataset:
        corpus: LocalCorpus | HubCorpus = identify_dataset(
            request.dataset, request.dataset_config, request.split, request.dataset_revision
        )
    else:
        corpus = identify_files(files)
    keys = make_keys(request, backend, corpus)
    digests = [store_digest(key) for key in keys]
    todo = [key for key, digest in zip(keys, digests, strict=True) if not StorePaths(stores, digest).sealed.is_dir()]
    if not todo:
        return digests
    widths = backend.widths([key.hook for key in todo])
    paths = [StorePaths(stores, store_digest(key)) for key in todo]
    report = ReadReport()
    with contextlib.ExitStack() as locks:
        for one in [] if dry_run else paths:
            locks.enter_context(writing(one))
        sequences = _read_sequences(todo[0], corpus, files, backend, report)
        rows = sequences.rows if request.rows is None else request.rows
        open_one = StoreWriter if dry_run else open_writer
        writers = [open_one(p, key, rows, width) for p, key, width in zip(paths, todo, widths, strict=True)]
        plan = _make_plan(writers, sequences, rows, report, stores)
        progress.on_plan(plan)
        if not dry_run:
            _run(request, backend, sequences, writers, progress)
    return digests


def _read_sequences(
    key: StoreKey, corpus: LocalCorpus | HubCorpus, files: list[Path], backend: Backend, report: ReadReport
) -> Sequences:
    """Read, tokenize and cut the corpus; refuse one that changed since it was identified."""
    documents = read_documents(corpus, files, key.text_field, key.bad_lines, key.max_documents, report)
    rows = None if key.rows == "all" else key.rows
    stream = tokenized(documents, backend.tokenize, backend.vocabulary_size)
    sequences = make_sequences(stream, key.sequences, backend.bos if key.sequences.bos else None, rows)
    if isinstance(corpus, LocalCorpus) and identify_files(files) != corpus:
        raise CorpusError("the corpus changed while it was read", ", ".join(map(str, files[:3])), "run the command again")
    return sequences


def _make_plan(writers: list[StoreWriter], sequences: Sequences, rows: int, report: ReadReport, stores: Path) -> Plan:
    """Return the plan. Raises: DiskFull: the disk cannot hold what is missing and keep MIN_FREE_BYTES free."""
    listed = [
        {
            "digest": w.paths.digest,
            "hook": w.key.hook,
            "d_model": w.d_model,
            "dtype": w.key.dtype,
            "missing_bytes": w.missing_bytes,
        }
        for w in writers
    ]
    plan = Plan(
        rows, sequences.covering(0, rows)[1], report.documents, report.empty, report.bad, listed,
        sum(w.missing_bytes for w in writers), durable.free_bytes(stores),
    )  # fmt: skip
    if plan.needed_bytes + MIN_FREE_BYTES > plan.free_bytes:
        raise DiskFull(
            f"the capture needs {plan.needed_bytes / 1e9:.2f} GB (and {MIN_FREE_BYTES / 1e9:.2f} GB to spare), "
            f"{plan.free_bytes / 1e9:.2f} GB are free",
            where=str(stores),
            do="make space, name another --stores folder, or ask for fewer --rows or a narrower --dtype",
        )
    return plan


def _run(request: CaptureRequest, backend: Backend, sequences: Sequences, writers: list[StoreWriter], progress: Progress) -> None:
    """Compute the missing row groups of all writers in one pass over the sequences, and seal."""
    start = time.monotonic()
    per_batch = max(1, (request.batch_tokens or default_batch_tokens(backend.device)) // request.seq_len)
    collectors = [Collector(writer, sequences) for writer in writers]
    hooks = [writer.key.hook for writer in writers]
    with write_behind() as put:
        for batch, needed in batches(sequences, collectors, per_batch):
            first, last = sequences.starts[batch[0]], sequences.starts[batch[1]]
            tokens, lengths = padded(sequences, *batch)
            acts = backend.activations(tokens, lengths, hooks) if needed else []
            for collector, x in zip(collectors, acts, strict=bool(acts)):
                collector.add(int(first), x, put)
            progress.on_rows(int(min(last, writers[0].rows) - min(first, writers[0].rows)))
    vocabulary = backend.vocabulary()
    provenance = _provenance(request, backend, per_batch * request.seq_len, time.monotonic() - start)
    for writer in writers:
        seal(writer, {"tokens": vocabulary.tokens, "special": vocabulary.special}, provenance)


def default_batch_tokens(device: str) -> int:
    """Return the tokens of one model batch on a device: beyond these a CPU's caches or a GPU's cores gain nothing more."""
    return 4096 if device == "cpu" else 32768


def _provenance(request: CaptureRequest, backend: Backend, batch_tokens: int, elapsed_s: float) -> dict[str, Any]:
    """Return what is written beside the key for people to read; it decides nothing."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("actstore", "torch", "transformer_lens", "transformers", "tokenizers", "numpy", "zarr"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "model": Path(request.model).name if Path(request.model).is_dir() else request.model,
        "device": backend.device,
        "batch_tokens": batch_tokens,
        "elapsed_s": round(elapsed_s, 3),
        "versions": versions,
    }
