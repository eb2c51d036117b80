"""Documents, from JSONL(.gz), text and Parquet files, folders of them, or a hub dataset; bounded memory.

A JSONL line or Parquet row is one document, a .txt file is one document. A document's index is its place among all
records of the corpus, skipped ones included, so that it can be found again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from actstore.errors import CorpusError, StorageFailed, UsageError
from actstore.key import CorpusFile, HubCorpus, LocalCorpus
from actstore.limits import MAX_CORPUS_FILES, MAX_DOCUMENT_BYTES, MIB

FileFormat = Literal["jsonl", "jsonl.gz", "txt", "parquet"]
FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".jsonl.gz": "jsonl.gz", ".json.gz": "jsonl.gz", ".txt": "txt", ".parquet": "parquet",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus and its place among all records."""

    index: int
    text: str


@dataclass(slots=True)
class ReadReport:
    """What reading found: documents passed on, empty ones left out, bad records skipped."""

    documents: int = 0
    empty: int = 0
    bad: int = 0


class BadRecord(NamedTuple):
    """Why a record is not a document."""

    reason: str


Text = str | BadRecord


def file_format(path: Path) -> FileFormat | None:
    """Return how a file is read, by its suffix, or None.

    Example:
        >>> file_format(Path("a/b.jsonl.gz")), file_format(Path("a/b.bin"))
        ('jsonl.gz', None)
    """
    return next((FORMATS[s] for s in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(s)), None)


def find_files(paths: list[Path]) -> list[Path]:
    """Return the corpus files that `paths` name, in order; a folder stands for its corpus files, sorted by path.

    Raises: UsageError: a path that does not exist, has an unknown suffix, or a folder without any corpus file.
    """
    known = ", ".join(FORMATS)
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and file_format(p))
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


def identify_files(files: list[Path]) -> LocalCorpus:
    """Return the identity of local files: one SHA-256 over their raw bytes in order, each one's size and format."""
    digest, listed = hashlib.sha256(), []
    for path in files:
        size = 0
        try:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(4 * MIB):
                    digest.update(piece)
                    size += len(piece)
        except OSError as error:
            raise StorageFailed(f"read failed: {error.strerror}", where=str(path)) from error
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
    corpus: LocalCorpus | HubCorpus,
    files: list[Path],
    text_field: str,
    bad_lines: Literal["error", "skip"],
    max_documents: int | None,
    report: ReadReport,
) -> Iterator[Document]:
    """Yield the documents of a corpus in order, counting into `report`.

    Args:
        corpus: its identity.
        files: the local files of a LocalCorpus, in the same order; empty for a hub dataset.
        text_field: the field that holds the text; a dotted path reaches into nested objects.
        bad_lines: what a record that is no document does: end the reading, or be skipped and counted.
        max_documents: stop after this many documents.
        report: counters, changed as reading goes on.

    Raises: CorpusError: file:line and reason.
    """
    records = _hub_records(corpus, text_field) if isinstance(corpus, HubCorpus) else _file_records(files, text_field)
    for index, (place, text) in enumerate(records):
        if isinstance(text, BadRecord):
            if bad_lines == "error":
                raise CorpusError(text.reason, place, "mend it (or name its field with --text-field), or pass --bad-lines skip")
            report.bad += 1
            continue
        if not text.strip():
            report.empty += 1
            continue
        report.documents += 1
        yield Document(index, text)
        if report.documents == max_documents:
            return


def _file_records(files: list[Path], text_field: str) -> Iterator[tuple[str, Text]]:
    for path in files:
        try:
            match file_format(path):
                case "txt":
                    yield str(path), _text_file(path)
                case "parquet":
                    yield from _parquet_records(path, text_field)
                case "jsonl.gz":
                    with gzip.open(path, "rb") as file:
                        yield from _line_records(path, cast(IO[bytes], file), text_field)
                case _:
                    with open(path, "rb") as file:
                        yield from _line_records(path, file, text_field)
        except (OSError, EOFError, zlib.error) as error:  # a cut .gz file ends in EOFError, a damaged one in zlib.error
            raise CorpusError(f"the corpus file cannot be read: {error}", str(path)) from error


def _line_records(path: Path, file: IO[bytes], text_field: str) -> Iterator[tuple[str, Text]]:
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise CorpusError(
                f"a line of over {MAX_DOCUMENT_BYTES} bytes", f"{path}:{number}", "a JSONL file has one document a line"
            )
        yield f"{path}:{number}", _parse_line(line, text_field)


def _parse_line(line: bytes, text_field: str) -> Text:
    if not line.strip():
        return ""
    try:
        return _field(json.loads(line.decode("utf-8")), text_field)
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode()) + 1
        return BadRecord(f"not valid JSON: {error.msg.partition(' (')[0]} at byte {at} of the line")
    except RecursionError:
        return BadRecord("not valid JSON: nested too deeply")
    except ValueError:
        return BadRecord("not valid JSON: an integer of thousands of digits")


def _text_file(path: Path) -> Text:
    with open(path, "rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        return BadRecord(f"a .txt file is one document, of at most {MAX_DOCUMENT_BYTES} bytes; use JSONL for more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1}")


def _parquet_records(path: Path, text_field: str) -> Iterator[tuple[str, Text]]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                yield f"{path}: row {row}", _field(record, text_field)
                row += 1
    except pyarrow.ArrowException as error:
        raise CorpusError(f"not a readable Parquet file: {str(error)[:200]}", str(path)) from error


def _hub_records(corpus: HubCorpus, text_field: str) -> Iterator[tuple[str, Text]]:
    import datasets

    stream = datasets.load_dataset(corpus.dataset, corpus.config, split=corpus.split, revision=corpus.revision, streaming=True)
    for index, record in enumerate(stream):
        yield f"{corpus.dataset}: row {index}", _field(record, text_field)


def _field(record: Any, text_field: str) -> Text:
    """Return the text field of a parsed record; a dotted path is walked when no field has the whole name."""
    if not isinstance(record, dict):
        return BadRecord(f"expected an object with a field {text_field!r}, found {type(record).__name__}")
    value: Any = record
    for part in [text_field] if text_field in record else text_field.split("."):
        if not isinstance(value, dict) or part not in value:
            return BadRecord(f"no field {text_field!r}; the record has {', '.join(sorted(map(str, record)))[:200] or 'none'}")
        value = value[part]
    if not isinstance(value, str):
        return BadRecord(f"field {text_field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        return BadRecord(f"field {text_field!r} holds half of a surrogate pair, which is not text")
    return value
