"""The phase-1 pipeline: one pass of the model feeds one store a hook point; repeating it resumes it.

Several processes may run the same capture at once when it was asked for with `workers`; see `fill`. A capture that
differs from a sealed store only in the number of rows takes the row groups they share from it; see `link`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.backends import Backend, OutOfMemoryError, Vocabulary, load_backend
from actstore.content import chat_content, text_content, token_content
from actstore.corpus import ReadReport, find_files, identify_dataset, identify_files, read_documents
from actstore.errors import CorpusError, FormatError, StoreDamaged, UsageError
from actstore.fill import fill
from actstore.key import HubCorpus, LocalCorpus, StoreKey, store_digest
from actstore.link import link_group, linkable
from actstore.pipeline import Collector
from actstore.places import Place, place_of
from actstore.plan import make_plan, refuse
from actstore.progress import Plan, Progress, StoppedError
from actstore.reader import Store
from actstore.records import HubStream, Records, file_records
from actstore.reference_rows import padded_documents
from actstore.request import CaptureRequest, chat_template, make_keys
from actstore.sequences import Sequences, Tokenized, tokenized
from actstore.spool import Spool
from actstore.timeline import Timeline
from actstore.writer import StoreWriter

__all__ = ["CaptureRequest", "Derivation", "Plan", "Progress", "StoppedError", "capture", "derive"]


@dataclass(frozen=True, slots=True)
class Derivation:
    """A request made definite: the model opened, the corpus identified, the keys known.

    Args:
        request: what was asked for.
        backend: the model, its weights not loaded.
        corpus: identity of the corpus.
        files: its local files.
        keys: the store key of each hook point, in the order asked for.
        batch_tokens: tokens of one batch of the model, at most.
    """

    request: CaptureRequest
    backend: Backend
    corpus: LocalCorpus | HubCorpus
    files: list[Path]
    keys: list[StoreKey]
    batch_tokens: int

    @contextlib.contextmanager
    def reading(self, report: ReadReport, spool: Path | None = None) -> Iterator[Sequences]:
        """Yield the corpus as sequences while a thread reads, tokenizes and cuts it, counting into `report`.

        `Sequences.wait` raises what goes wrong there, CorpusError among others: also when the corpus changed meanwhile.

        Args:
            report: counters, changed as reading goes on.
            spool: folder where what was read of a hub stream is kept, so that it is not streamed again on resume.
        """
        key = self.keys[0]
        if isinstance(self.corpus, HubCorpus):
            ids = self._streamed(self.corpus, report, spool)
        else:
            ids = self._tokenized(file_records(self.files), report)
        bos = self.backend.bos if key.sequences.bos else None
        if key.sequences.packing == "reference":
            ids = padded_documents(ids, key.sequences, self.backend)
        sequences = Sequences(key.sequences, bos, None if key.rows == "all" else key.rows, self.batch_tokens)
        with sequences.reading(ids, self._verify_files):
            yield sequences

    def _tokenized(
        self, records: Records, report: ReadReport, on_block: Callable[[Tokenized], None] = lambda block: None
    ) -> Iterator[tuple[int, list[int]]]:
        key, vocabulary = self.keys[0], self.backend.vocabulary_size
        if key.content == "tokens":
            content = token_content(key.text_field, vocabulary)
        elif key.content == "chat":
            template = chat_template(self.request, self.backend)
            content = chat_content(key.text_field, lambda messages: self.backend.render(messages, template))
        else:
            content = text_content(key.text_field)
        documents = read_documents(records, key.text_field, content, key.bad_lines, key.max_documents, report)
        strip = key.sequences.packing == "reference"
        return tokenized(
            documents, lambda texts: self.backend.tokenize([t.strip() for t in texts] if strip else texts), vocabulary, on_block
        )

    def _streamed(self, corpus: HubCorpus, report: ReadReport, spool: Path | None) -> Iterator[tuple[int, list[int]]]:
        if spool is None:
            yield from self._tokenized(HubStream(corpus).records(), report)
            return
        kept = Spool(spool, report, self.backend.vocabulary_size)
        yield from kept.replay()
        stream = HubStream(corpus, kept.state, report.records)
        yield from self._tokenized(stream.records(), report, lambda block: kept.append(block, stream.state()))

    def _verify_files(self) -> None:
        """Make sure that the local files are still those of the key. Raises: CorpusError."""
        if isinstance(self.corpus, LocalCorpus) and identify_files(self.files) != self.corpus:
            where = ", ".join(map(str, self.files[:3]))
            raise CorpusError("the corpus changed while it was read", where, "run the command again")


def derive(request: CaptureRequest) -> Derivation:
    """Open the model, identify the corpus and make the keys; loads no weights. Raises: UsageError, CorpusError."""
    files = find_files(list(request.corpus))
    backend = load_backend(request.backend, request.model, request.revision, request.compute_dtype, request.device, request.hooks)
    if request.dataset:
        corpus: LocalCorpus | HubCorpus = identify_dataset(
            request.dataset, request.dataset_config, request.split, request.dataset_revision
        )
    else:
        corpus = identify_files(files)
    keys = make_keys(request, backend, corpus)
    batch_tokens = request.batch_tokens or default_batch_tokens(backend.device)
    return Derivation(request, backend, corpus, files, keys, batch_tokens)


def capture(request: CaptureRequest, progress: Progress | None = None, dry_run: bool = False) -> list[str]:
    """Capture every hook point of a request into its own store; finished stores cost nothing, started ones resume.

    Args:
        request: what to capture.
        progress: callbacks for a plan and for rows.
        dry_run: stop after the plan and the reading of the corpus.

    Returns: the store digest of each hook point, in the order asked for.
    Raises: UsageError, CorpusError, KeyMismatch, NonFiniteActivation, StoreLocked, DiskFull, StorageFailed;
        StoppedError when `progress.stop` asked for it. Row groups committed before that stay, and the same request goes on
        from them.
    """
    progress = progress or Progress()
    place, derived = place_of(request.stores, progress.on_note), derive(request)
    digests = [store_digest(key) for key in derived.keys]
    todo = [key for key, digest in zip(derived.keys, digests, strict=True) if place.sealed_rows(digest) is None]
    if not todo:
        return digests
    widths = derived.backend.widths([key.hook for key in todo])
    with contextlib.ExitStack() as locks:
        for key in [] if dry_run else todo:
            locks.enter_context(place.holding(store_digest(key), request.workers > 1))
        report, spool = ReadReport(), None
        if isinstance(derived.corpus, HubCorpus) and request.workers == 1 and not dry_run:
            spool = place.spool(store_digest(todo[0]))
        with derived.reading(report, spool) as sequences:
            if request.rows is None:
                sequences.wait()
            rows = request.rows or sequences.rows
            writers = [place.writer(key, rows, width) for key, width in zip(todo, widths, strict=True)]
            sources = [place.sources(writer, locks) for writer in writers]
            for writer in writers:
                writer.look_again()
            plan = make_plan(writers, sources, derived.backend, place.free_bytes(), rows)
            refuse(plan, str(place))
            progress.on_plan(plan)
            if not dry_run:
                with progress.timeline.part("load"):  # while the corpus is being read
                    vocabulary = derived.backend.vocabulary()
                    if plan.needed_bytes:
                        _load(derived.backend, [key.hook for key in todo])
            if dry_run or isinstance(derived.corpus, LocalCorpus):
                # Nothing is computed from local files before they have proved to be those of the key. A hub commit
                # cannot change, and the network is slow: the model runs while it is read.
                with progress.timeline.part("read"):
                    sequences.wait()
                progress.on_corpus(report)
            if not dry_run:
                _run(derived, place, sequences, writers, sources, vocabulary, progress)
                if isinstance(derived.corpus, HubCorpus):
                    progress.on_corpus(report)
    return digests


def _load(backend: Backend, hooks: list[str]) -> None:
    try:
        backend.prepare(hooks)
    except OutOfMemoryError as error:
        raise UsageError(
            f"the weights do not fit into the memory of {backend.device}: {error}",
            do="use a narrower --compute-dtype, an earlier hook point, or a larger device",
        ) from error


def _run(
    derived: Derivation, place: Place, sequences: Sequences, writers: list[StoreWriter], sources: list[list[Store]],
    vocabulary: Vocabulary, progress: Progress,
) -> None:  # fmt: skip
    """Fill all writers' stores in one pass over the sequences, and seal them."""
    workers = derived.request.workers
    opened = [place.open(writer, workers > 1) for writer in writers]

    def share(of: list[Store]) -> Callable[[StoreWriter, int], bool]:
        def link(writer: StoreWriter, index: int) -> bool:
            for source in of:
                if linkable(writer, source, index):
                    try:
                        link_group(writer, source, index)
                    except (StoreDamaged, FormatError) as error:
                        progress.on_note(f"row group {index} is computed, not shared: {error}")
                    else:
                        return True
            return False

        return link

    collectors = [
        Collector(writer, sequences, share=share(of))
        for writer, of in zip(opened, sources, strict=True)
        if not writer.is_sealed()  # by another worker, just now
    ]
    if collectors:
        fill(derived.backend, sequences, collectors, derived.request.rank / workers, progress)
    sequences.wait()  # nothing is sealed from a corpus whose reading failed later
    provenance = _provenance(derived, progress.timeline)
    for writer in (collector.writer for collector in collectors):
        place.seal(writer, {"tokens": vocabulary.tokens, "special": vocabulary.special}, provenance)


def default_batch_tokens(device: str) -> int:
    """Return the tokens of one model batch on a device.

    On a CPU enough to keep its cores busy and no more: the MLP's activations of a larger batch are so large that the
    allocator gives them back to the system and faults every page in again, a fifth of the time on two cores.
    """
    return min(4096, max(1024, 512 * (os.cpu_count() or 1))) if device == "cpu" else 32768


def _provenance(derived: Derivation, timeline: Timeline) -> dict[str, Any]:
    """Return what is written beside the key for people to read; it decides nothing."""
    from importlib.metadata import PackageNotFoundError, version

    model, versions = derived.request.model, {}
    for package in ("actstore", "torch", "transformer_lens", "transformers", "tokenizers", "numpy", "zarr"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "device": derived.backend.device,
        "batch_tokens": derived.batch_tokens,
        "elapsed_s": round(time.perf_counter() - timeline.start, 3),
        "timeline": {name: round(share, 4) for name, share in timeline.shares().items()},
        "versions": versions,
    }
