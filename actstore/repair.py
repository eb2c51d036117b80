"""Damage mended by computing it again: only the damaged row groups, accepted only if the recorded digest returns.

The row groups are computed by the ordinary capture code into a scratch place, compared with the digests that the
manifest holds, and moved over the damaged files one by one. Each moved file is what the manifest names, so a repair
may be killed at any point. Nothing else in the store changes, and a manifest is never rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from actstore import durable
from actstore.capture import Derivation, derive
from actstore.check import check_store
from actstore.corpus import ReadReport
from actstore.digests import sha256_bytes
from actstore.errors import ActstoreError, KeyMismatch, UsageError
from actstore.files import read_bounded
from actstore.fill import fill
from actstore.key import HubCorpus, StoreKey
from actstore.layout import StorePaths, chunk_name, record_name
from actstore.limits import MAX_DOCUMENT_BYTES
from actstore.pipeline import Collector
from actstore.progress import Progress
from actstore.reader import Store
from actstore.request import CaptureRequest
from actstore.seal import small_files
from actstore.sealed import small_file_problems
from actstore.writer import READ_ONLY, StoreWriter, open_writer
from actstore.zarr_array import CRC_BYTES, chunk_shape, numpy_dtype

SAME_NAMES = {"text_field", "bad_lines", "max_documents", "dtype", "compute_dtype", "center", "backend"}  # in key and request


@dataclass(slots=True)
class RepairReport:
    """What a repair did.

    Args:
        digest: the store digest.
        damaged: row groups that were found damaged.
        repaired: those that are whole again.
        files: small files that were written again.
        refused: for each row group that came out different, a sentence.
    """

    digest: str
    damaged: list[int] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "digest": self.digest, "damaged_row_groups": self.damaged, "repaired_row_groups": self.repaired,
            "files": self.files, "refused": self.refused,
        }  # fmt: skip


def request_of(
    store: Store, model: str | None, corpus: tuple[Path, ...], stores: Path, chat_template: str = "default"
) -> CaptureRequest:
    """Return the request that captures a store again: its key says all but where model and corpus lie here.

    Args:
        store: the damaged store.
        model: local folder of the model; None for a hub model, whose name and commit are in the key.
        corpus: local corpus files, in their order; empty for a hub dataset.
        stores: folder of stores.
        chat_template: that the store was captured with; only looked at when it was.

    Raises: UsageError: the store came from local files, and they were not named.
    """
    key = store.key
    if model is None and key.model.name is None:
        raise UsageError(
            "the store was captured from a local model folder",
            do=f"actstore repair {store.digest[:12]} --model FOLDER --corpus FILE",
        )
    hub = key.corpus if isinstance(key.corpus, HubCorpus) else None
    if not corpus and hub is None:
        raise UsageError("the store was captured from local files", do=f"actstore repair {store.digest[:12]} --corpus FILE")
    batch_tokens = store.manifest.provenance.get("batch_tokens")  # a hint: without it the digest may not return
    return CaptureRequest(
        model=model or str(key.model.name), hooks=(key.hook,), corpus=corpus,
        dataset=None if corpus or hub is None else hub.dataset, dataset_config=hub.config if hub else None,
        dataset_revision=hub.revision if hub else None, split=hub.split if hub else "train",
        **key.sequences.model_dump(), **key.model_dump(include=SAME_NAMES),
        token_field=key.text_field if key.content == "tokens" else None,
        chat_template=chat_template if key.content == "chat" else None,
        rows=None if key.rows == "all" else key.rows, revision=None if model else key.model.revision, stores=stores,
        batch_tokens=batch_tokens if isinstance(batch_tokens, int) and 0 < batch_tokens < 1 << 30 else None,
    )  # fmt: skip


def repair(
    request: CaptureRequest, store: Store, stores: Path, on_rows: Callable[[int], None] = lambda rows: None,
    on_check: Callable[[int, int], None] = lambda done, total: None,
) -> RepairReport:  # fmt: skip
    """Repair a sealed store in place.

    Args:
        request: captures this store, among others perhaps; see `request_of`.
        store: the store, from `open_unchecked`.
        stores: folder of stores.
        on_rows: called with the rows just computed.
        on_check: called with (row groups checked, row groups in all).

    Returns: what was done; a row group that came out different is left as it was, and named in `refused`.
    Raises: KeyMismatch: model, tokenizer or corpus are not those the store was captured from. StoreLocked: somebody
        reads it. CorpusError, DiskFull, StorageFailed: nothing has changed.
    """
    paths = StorePaths(stores, store.digest)
    with durable.lock(paths.lock, "a repair"):
        report = RepairReport(store.digest, check_store(store.path, True, on_check).damaged)
        files = [*small_file_problems(store.path, store.manifest, store.statistics)]
        if report.damaged or files:
            derived = derive(replace(request, stores=stores))
            derived = replace(derived, keys=[_same_key(derived, store.key)])
        for leftover in (paths.scratch.staging, paths.scratch.sealed):
            durable.remove_tree(leftover)  # of a repair that was interrupted: nothing proves what it holds
        if report.damaged:
            writer = _compute_again(derived, store, paths.scratch, report.damaged, on_rows)
            for index in report.damaged:
                if writer.committed[index] == store.manifest.groups[index]:
                    _accept(writer, store, index)
                    report.repaired.append(index)
                else:
                    report.refused.append(_difference(writer, store, index))
        if files:
            _mend_small_files(derived, store, paths.scratch, files, report)
        for leftover in (paths.scratch.staging, paths.scratch.claims):
            durable.remove_tree(leftover)
    return report


def _same_key(derived: Derivation, wanted: StoreKey) -> StoreKey:
    """Return the derived key that equals the store's. Raises: KeyMismatch: listing each differing field."""
    for key in derived.keys:
        if key == wanted:
            return key
    here = next((key for key in derived.keys if key.hook == wanted.hook), derived.keys[0]).model_dump()
    there = wanted.model_dump()
    differing = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    lines = [f"{n}: the store has {str(there.get(n))[:120]}, here it is {str(here.get(n))[:120]}" for n in differing]
    raise KeyMismatch(
        f"these are not the files the store was captured from: {', '.join(differing)} differ",
        "; ".join(lines),
        "give the model folder and corpus files it was captured from, in the same order",
    )


def _compute_again(
    derived: Derivation, store: Store, scratch: StorePaths, damaged: Iterable[int], on_rows: Callable[[int], None]
) -> StoreWriter:
    """Commit the damaged row groups in the scratch place."""
    (width,) = derived.backend.widths([store.key.hook])
    with derived.reading(ReadReport()) as sequences:
        sequences.wait()
        if width != store.d_model or sequences.rows < store.rows:
            raise KeyMismatch(
                f"the capture gives {sequences.rows} rows of {width}, the store has {store.rows} of {store.d_model}"
            )
        writer = open_writer(scratch, store.key, store.rows, width)
        fill(derived.backend, sequences, [Collector(writer, sequences, only=damaged)], progress=Progress(on_rows=on_rows))
    return writer


def _accept(writer: StoreWriter, store: Store, index: int) -> None:
    """Move the files of a row group whose digest returned over the damaged ones."""
    for name in (*(chunk_name(array, index) for array in writer.arrays), record_name(index)):
        _move_over(writer.paths.staging / name, store.path / name)


def _move_over(source: Path, target: Path) -> None:
    """Replace a damaged file, or whatever lies in its place; a link is replaced, not followed."""
    if target.parent.is_symlink() or not target.parent.is_dir():
        durable.remove_tree(target.parent)
    durable.make_dir(target.parent)
    if target.is_dir() and not target.is_symlink():  # a rename replaces files and links only
        durable.remove_tree(target)
    durable.replace_file(source, target)


def _difference(writer: StoreWriter, store: Store, index: int) -> str:
    """Return a sentence about a row group that came out different: the first row that is not the one on disk."""
    start, stop = writer.span(index)
    said = f"row group {index} (rows {start} to {stop - 1}) came out different from what the manifest names; it was left as it is"
    dtype, shape = numpy_dtype("acts", store.dtype), chunk_shape("acts", writer.group_rows, store.d_model)
    try:
        both = [
            np.frombuffer(read_bounded(root, chunk_name("acts", index), MAX_DOCUMENT_BYTES)[:-CRC_BYTES], dtype)
            for root in (store.path, writer.paths.staging)
        ]
        old, new = (a.reshape(shape)[: stop - start].view(np.uint8) for a in both)
    except (OSError, ValueError, ActstoreError):  # the damaged file is not there, or has another size
        return said
    rows = np.flatnonzero((old != new).any(axis=1))
    return said if not len(rows) else f"{said}; {len(rows)} rows differ from the file on disk, the first is row {start + rows[0]}"


def _mend_small_files(derived: Derivation, store: Store, scratch: StorePaths, files: list[str], report: RepairReport) -> None:
    """Write key, vocabulary and Zarr metadata again where they are damaged, if they come out with the recorded digest."""
    contents = small_files(store.manifest, store.statistics, derived.backend.vocabulary().model_dump())
    for name in files:
        if sha256_bytes(contents.get(name, b"")) != store.manifest.files[name]:
            report.refused.append(f"file {name} came out different from what the manifest names; it was left as it is")
            continue
        durable.make_dir((scratch.staging / name).parent)
        durable.write_new(scratch.staging, name, [contents[name]], mode=READ_ONLY, replace=True)
        _move_over(scratch.staging / name, store.path / name)
        report.files.append(name)
