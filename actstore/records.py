"""The records of corpus files, format by format, and of hub streams; bounded memory, every error with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from actstore.content import BadRecord
from actstore.errors import CorpusError
from actstore.key import FileFormat, HubCorpus
from actstore.limits import MAX_DOCUMENT_BYTES

FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".jsonl.gz": "jsonl.gz", ".json.gz": "jsonl.gz", ".jsonl.bz2": "jsonl.bz2",
    ".jsonl.xz": "jsonl.xz", ".txt": "txt", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".arrow": "arrow",
}  # fmt: skip
BOOKKEEPING = ("dataset_info.json", "state.json")  # beside the *.arrow files of `Dataset.save_to_disk`
Records = Iterator[tuple[str, Any]]  # the place of each, and an object, a text or a BadRecord


def file_format(path: Path) -> FileFormat | None:
    """Return how a file is read, by its suffix, or None.

    Example:
        >>> file_format(Path("a/b.jsonl.gz")), file_format(Path("a/b.bin"))
        ('jsonl.gz', None)
    """
    return next((FORMATS[s] for s in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(s)), None)


def file_records(files: list[Path]) -> Records:
    """Yield the records of files in order. Raises: CorpusError: a file that cannot be read as what its name says."""
    for path in files:
        kind = file_format(path)
        assert kind is not None, "find_files takes no others"
        try:
            yield from READERS[kind](path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # a cut or damaged compressed file
            raise CorpusError(f"the corpus file cannot be read: {error}", str(path)) from error


def _text_file(path: Path) -> Records:
    with open(path, "rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        yield str(path), BadRecord(f"a .txt file is one document, of at most {MAX_DOCUMENT_BYTES} bytes; use JSONL for more")
        return
    try:
        yield str(path), data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield str(path), BadRecord(f"not UTF-8 at byte {error.start + 1}")


def _lines(opened: Callable[..., Any]) -> Callable[[Path], Records]:
    """Return the reader of JSONL that `opened` decompresses."""

    def read(path: Path) -> Records:
        with opened(path, "rb") as file:
            number = 0
            while line := cast(IO[bytes], file).readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise CorpusError(
                        f"a line of over {MAX_DOCUMENT_BYTES} bytes", f"{path}:{number}", "a JSONL file has one document a line"
                    )
                yield f"{path}:{number}", parse_line(line)

    return read


def parse_line(line: bytes) -> Any:
    """Return the JSON value of a line, "" for a blank one, or a BadRecord with the byte at which it goes wrong.

    Example:
        >>> parse_line(b'{"text": "x"}'), parse_line(b'{"text": x}').reason
        ({'text': 'x'}, 'not valid JSON: Expecting value at byte 10 of the line')
    """
    if not line.strip():
        return ""
    try:
        value = json.loads(line.decode("utf-8"))
        return value if not isinstance(value, str) else BadRecord("expected an object, found str")
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode()) + 1
        return BadRecord(f"not valid JSON: {error.msg.partition(' (')[0]} at byte {at} of the line")
    except RecursionError:
        return BadRecord("not valid JSON: nested too deeply")
    except ValueError:
        return BadRecord("not valid JSON: an integer of thousands of digits")


def _table(delimiter: str) -> Callable[[Path], Records]:
    """Return the reader of a table whose first line names the columns."""

    def read(path: Path) -> Records:
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:  # a byte that is no UTF-8 is found below
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                names = next(rows, [])
                for row in rows:
                    place = f"{path}:{rows.line_num}"
                    if len(row) == len(names):
                        yield place, dict(zip(names, row, strict=True))
                    elif row:
                        yield place, BadRecord(f"{len(row)} fields, the first line names {len(names)}")
            except csv.Error as error:
                raise CorpusError(f"not a readable table: {error}", f"{path}:{rows.line_num}") from error

    return read


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from _arrow_rows(path, pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256))
    except pyarrow.ArrowException as error:
        raise CorpusError(f"not a readable Parquet file: {str(error)[:200]}", str(path)) from error


def _arrow(path: Path) -> Records:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)  # what `datasets` writes
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _arrow_rows(path, batches)
    except pyarrow.ArrowException as error:
        raise CorpusError(f"not a readable Arrow file: {str(error)[:200]}", str(path)) from error


def _arrow_rows(path: Path, batches: Any) -> Records:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 256):
            for record in batch.slice(start, 256).to_pylist():
                yield f"{path}: row {row}", record
                row += 1


READERS: dict[FileFormat, Callable[[Path], Records]] = {
    "jsonl": _lines(open), "jsonl.gz": _lines(gzip.open), "jsonl.bz2": _lines(bz2.open), "jsonl.xz": _lines(lzma.open),
    "txt": _text_file, "parquet": _parquet, "csv": _table(","), "tsv": _table("\t"), "arrow": _arrow,
}  # fmt: skip


class HubStream:
    """A hub dataset, streamed; its position can be kept and gone back to.

    Args:
        corpus: its identity.
        state: what `state` gave in another process, to go on from there.
        first: index of the first record then.
    """

    def __init__(self, corpus: HubCorpus, state: dict[str, Any] | None = None, first: int = 0) -> None:
        import datasets

        self._name, self._first = corpus.dataset, first
        self._stream: Any = datasets.load_dataset(
            corpus.dataset, corpus.config, split=corpus.split, revision=corpus.revision, streaming=True
        )
        if state is not None:
            self._stream.load_state_dict(state)

    def records(self) -> Records:
        """Yield the records from the first one on."""
        for index, record in enumerate(self._stream, self._first):
            yield f"{self._name}: row {index}", record

    def state(self) -> dict[str, Any]:
        """Return the position behind the last record taken, as JSON values (`IterableDataset.state_dict`)."""
        return cast(dict[str, Any], self._stream.state_dict())
