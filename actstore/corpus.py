"""Documents: which files or hub dataset a corpus is, and which of its records are documents.

A line or row is one document, a .txt file is one document. A document's index is its place among all records of the
corpus, skipped ones included, so that it can be found again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from actstore.content import BadRecord, Content, Reader, field_of
from actstore.digests import pieces_of
from actstore.errors import CorpusError, UsageError
from actstore.key import CorpusFile, FileFormat, HubCorpus, LocalCorpus
from actstore.limits import MAX_CORPUS_FILES
from actstore.records import BOOKKEEPING, FORMATS, Records, file_format


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus, a text or token ids, and its place among all records."""

    index: int
    content: Content


@dataclass(slots=True)
class ReadReport:
    """What reading found: records in all, of them documents passed on, empty ones left out, bad ones skipped."""

    records: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0


def find_files(paths: list[Path]) -> list[Path]:
    """Return the corpus files that `paths` name, in order; a folder stands for its corpus files, sorted by path.

    Raises: UsageError: a path that does not exist, has an unknown suffix, or a folder without any corpus file.
    """
    known = ", ".join(FORMATS)
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = _corpus_files(path)
            if not inside:
                raise CorpusError("the corpus folder holds no file that can be read", str(path), f"files must end in {known}")
            found += inside
        elif not path.exists():
            raise UsageError("the corpus does not exist", str(path), "give --corpus an existing file or folder")
        elif not path.is_file():
            raise CorpusError("the corpus is not a regular file", str(path), "write it to a file: it is read twice")
        elif file_format(path) is None:
            raise UsageError("the corpus file has an unknown suffix", str(path), f"files must end in {known}")
        else:
            found.append(path)
    if len(found) > MAX_CORPUS_FILES:
        raise UsageError(f"{len(found)} corpus files, at most {MAX_CORPUS_FILES} are allowed", do="join small files into JSONL")
    return found


def _corpus_files(folder: Path) -> list[Path]:
    """Return the corpus files below a folder, sorted by path; of one that `datasets` saved, its *.arrow files.

    Raises: UsageError: it holds several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise UsageError(
            f"the saved dataset has {len(splits)} splits: {', '.join(splits)[:200]}", str(folder), f"name one: {folder}/SPLIT"
        )
    found = sorted(p for p in folder.rglob("*") if p.is_file() and file_format(p))
    saved = {p.parent for p in found if file_format(p) == "arrow"}
    return [p for p in found if p.parent not in saved or p.name not in BOOKKEEPING]


def identify_files(files: list[Path]) -> LocalCorpus:
    """Return the identity of local files: one SHA-256 over their bytes in order, each one's size and format.

    Raises: StorageFailed.
    """
    digest, listed = hashlib.sha256(), []
    for path in files:
        size = 0
        for piece in pieces_of(path):
            digest.update(piece)
            size += len(piece)
        listed.append(CorpusFile(format=cast(FileFormat, file_format(path)), bytes=size))
    return LocalCorpus(digest=digest.hexdigest(), files=listed)


def identify_dataset(dataset: str, config: str | None, split: str, revision: str | None) -> HubCorpus:
    """Resolve a hub dataset to a commit. Raises: UsageError: the hub is out of reach or has no such dataset."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes when offline
        raise UsageError(
            f"the hub dataset {dataset!r} cannot be reached ({type(error).__name__})",
            do="give local files instead: --corpus FILE.jsonl (each line an object with a text field)",
        ) from error
    return HubCorpus(dataset=dataset, config=config, split=split, revision=str(commit))


def read_documents(
    records: Records,
    field: str,
    content: Reader,
    bad_lines: Literal["error", "skip"],
    max_documents: int | None,
    report: ReadReport,
) -> Iterator[Document]:
    """Yield the documents of a corpus in order, counting into `report`.

    Args:
        records: of its files or stream; the index of the first is `report.records`.
        field: the field that holds the document; a dotted path reaches into nested objects.
        content: makes a text or token ids of the field's value.
        bad_lines: what a record that is no document does: end the reading, or be skipped and counted.
        max_documents: stop after this many documents.
        report: counters, changed as reading goes on.

    Raises: CorpusError: file:line and reason.

    Example:
        >>> from actstore.content import text_content
        >>> records = iter([("a:1", {"text": "x"}), ("a:2", {"text": ""})])
        >>> list(read_documents(records, "text", text_content("text"), "error", None, ReadReport()))
        [Document(index=0, content='x')]
    """
    if report.documents == max_documents:
        return
    for place, record in records:
        index = report.records
        report.records += 1
        value = record if isinstance(record, BadRecord) else field_of(record, field)
        found = value if isinstance(value, BadRecord) or value == "" else content(value)
        if isinstance(found, BadRecord):
            if bad_lines == "error":
                raise CorpusError(found.reason, place, "mend it (or name its field with --text-field), or pass --bad-lines skip")
            report.bad += 1
            continue
        if not (found.strip() if isinstance(found, str) else found):
            report.empty += 1
            continue
        report.documents += 1
        yield Document(index, found)
        if report.documents == max_documents:
            return
