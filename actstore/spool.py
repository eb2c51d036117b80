"""Token ids of a hub stream, kept beside an unfinished capture: a resumed one goes on in the stream where it stopped.

One line a block of documents: the SHA-256 of the rest, and JSON with document indices, lengths, token ids (int32, base64),
the counters, and the stream's position behind the block. Lines are appended without fsync. What a kill or a power
loss tears off is a line whose digest is wrong: it and all behind it are cut off, and streamed again.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from actstore import durable
from actstore.corpus import ReadReport
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError
from actstore.files import opened
from actstore.key import Strict, parse_record
from actstore.layout import SPOOL
from actstore.limits import MAX_DOCUMENT_BYTES
from actstore.sequences import Tokenized

MAX_LINE_BYTES = 16 * MAX_DOCUMENT_BYTES  # a block of documents


Count = Annotated[int, Field(ge=0)]


class _Block(Strict):
    """One line: indices and lengths of documents, their token ids, and counters and stream's position behind them."""

    index: list[Count]
    lengths: list[Count]
    ids: str
    report: dict[str, Count]
    state: dict[str, Any]


class Spool:
    """The spool of one capture, read first and then appended to.

    Args:
        folder: existing; of the unsealed store.
        report: counters, set to those of the last block when it has been read.
        vocabulary: token ids must lie in [0, vocabulary).
    """

    def __init__(self, folder: Path, report: ReadReport, vocabulary: int) -> None:
        self._folder, self._report, self._vocabulary = folder, report, vocabulary
        self.state: dict[str, Any] | None = None  # of the stream behind the last block
        self._good_bytes = 0

    def replay(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the documents of all whole blocks, and cut off what is behind them."""
        for block in self._blocks():
            yield from ((index, ids) for index, ids in block if ids)
        durable.truncate(self._folder / SPOOL, self._good_bytes)

    def _blocks(self) -> Iterator[Tokenized]:
        try:
            with opened(self._folder, SPOOL) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
                while (line := file.readline(MAX_LINE_BYTES)) and (parsed := _parse(line, self._vocabulary)):
                    documents, block = parsed
                    self.state = block.state
                    for name, value in block.report.items():
                        setattr(self._report, name, value)
                    self._good_bytes += len(line)
                    yield documents
        except FileNotFoundError:
            pass
        except FormatError:  # a link, or a folder: not ours
            durable.remove_tree(self._folder / SPOOL)

    def append(self, block: Tokenized, state: dict[str, Any]) -> None:
        """Keep one block and the stream's position behind it. Raises: DiskFull, StorageFailed."""
        ids = np.concatenate([np.zeros(0, "<i4"), *(np.asarray(ids, "<i4") for _, ids in block)])
        body = canonical_json(
            {
                "index": [index for index, _ in block],
                "lengths": [len(ids) for _, ids in block],
                "ids": base64.b64encode(ids.tobytes()).decode(),
                "report": asdict(self._report),
                "state": state,
            }
        )
        durable.append_line(self._folder / SPOOL, f"{sha256_bytes(body)} ".encode() + body + b"\n")


def _parse(line: bytes, vocabulary: int) -> tuple[Tokenized, _Block] | None:
    """Return the documents of a line and all that it says, or None when it is not whole or not ours."""
    digest, _, body = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or digest != sha256_bytes(body).encode():
        return None
    try:
        block = parse_record(_Block, body, SPOOL)
        ids = np.frombuffer(base64.b64decode(block.ids, validate=True), "<i4")
    except (FormatError, ValueError):
        return None
    if len(block.index) != len(block.lengths) or sum(block.lengths) != len(ids) or set(block.report) != set(asdict(ReadReport())):
        return None
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        return None
    cut = np.split(ids, np.cumsum(block.lengths)[:-1])
    return [(i, part.tolist()) for i, part in zip(block.index, cut, strict=True)], block
