"""Canonical JSON out, strict JSON in, and SHA-256: the one spelling that every digest of a store is taken of."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from actstore.errors import FormatError, StorageFailed, UsageError
from actstore.limits import MAX_JSON_DEPTH, MAX_JSON_DIGITS, MAX_JSON_FIELDS, MAX_JSON_VALUES, MIB

DIGEST = re.compile(r"[0-9a-f]{64}")
PREFIX = re.compile(r"[0-9a-f]{4,64}")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def canonical_json(value: Any) -> bytes:
    """Return `value` as UTF-8 JSON with sorted keys, no spaces and no NaN: equal values give equal bytes.

    Raises: ValueError: NaN or infinity. UnicodeEncodeError: a lone surrogate.

    Example:
        >>> canonical_json({"b": 1, "a": [True, None, "é"]}).decode()
        '{"a":[true,null,"é"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the pieces one after another, 64 hexadecimal digits.

    Example:
        >>> sha256_pieces([b"a", b"b"]) == sha256_bytes(b"ab")
        True
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data`, 64 hexadecimal digits.

    Example:
        >>> sha256_bytes(b"")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()


def pieces_of(path: Path, descriptor: int | None = None) -> Iterator[bytes]:
    """Yield a file's bytes in pieces of constant memory.

    Args:
        path: the file.
        descriptor: the same file, open already by `files.opened`; it stays open.

    Raises: StorageFailed: the operating system could not read it.

    Example:
        >>> list(pieces_of(Path("/dev/null")))
        []
    """
    try:
        with open(path if descriptor is None else descriptor, "rb", buffering=0, closefd=descriptor is None) as file:
            while piece := file.read(4 * MIB):
                yield piece
    except OSError as error:
        raise StorageFailed(f"read failed: {error.strerror}", where=str(path)) from error


def sha256_file(path: Path, descriptor: int | None = None) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits; see `pieces_of`.

    Example:
        >>> sha256_file(Path("/dev/null")) == sha256_bytes(b"")
        True
    """
    return sha256_pieces(pieces_of(path, descriptor))


def check_prefix(text: str) -> str:
    """Return `text` when it can be the beginning of a digest: 4 to 64 lower-case hexadecimal digits.

    Only text that passed here is ever compared with names in a folder; it never becomes a path by itself.

    Raises: UsageError: anything else (a path, upper case, too short).

    Example:
        >>> check_prefix("3fa9")
        '3fa9'
    """
    if not PREFIX.fullmatch(text):
        raise UsageError(
            f"{text[:80]!r} is not a digest: 4 to 64 lower-case hexadecimal digits are",
            do="give its first digits, such as 3fa9c1d2: `actstore ls` lists stores, `trainer ls` runs",
        )
    return text


def parse_json(data: bytes, what: str) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN, integers of at most 20 digits. The caller bounds the size.

    Args:
        data: the file's bytes.
        what: the file's name, for the message.

    Raises: FormatError: not strict JSON.

    Example:
        >>> parse_json(b'{"rows": 3}', "manifest.json")
        {'rows': 3}
    """

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is not allowed")

    if max(data.count(b","), data.count(b"[") + data.count(b"{")) > MAX_JSON_VALUES:
        raise FormatError(f"{what} has over {MAX_JSON_VALUES} values", where=what)

    def integer(text: str) -> int:
        return int(text) if len(text) <= MAX_JSON_DIGITS else refuse("an integer of over 20 digits")

    def real(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse("a number beyond float64")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs) if len(pairs) <= MAX_JSON_FIELDS else refuse(f"an object of over {MAX_JSON_FIELDS} fields")
        return found if len(found) == len(pairs) else refuse("a repeated key")

    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=refuse, parse_int=integer, parse_float=real, object_pairs_hook=unique)
        if _deeper(value, MAX_JSON_DEPTH):
            refuse("nesting this deep")
        if SURROGATE.search(text):  # a lone one passes json.loads
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{what} is not valid JSON: {reason[:200]}", where=what) from error


def _deeper(value: Any, levels: int) -> bool:
    """Return whether objects and lists lie in each other deeper than `levels`; what writes them out again recurses."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inside = (part.values() if isinstance(part, dict) else part for part in layer)
        layer = [part for parts in inside for part in parts if isinstance(part, dict | list)]
        if not layer:
            return False
    return True
