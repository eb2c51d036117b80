"""What a corpus record says: its text, its token ids, or a chat rendered by a template. A record that says neither is bad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class BadRecord(NamedTuple):
    """Why a record is not a document."""

    reason: str


Content = str | list[int]  # a text, or token ids
Reader = Callable[[Any], Content | BadRecord]  # from a field's value
Render = Callable[[list[dict[str, Any]]], str]  # a chat to the text that the model was trained on


def field_of(record: Any, path: str) -> Any:
    """Return a field of a parsed record, or why it has none; a text file is all field.

    A dotted path is walked when no field has the whole name.

    Example:
        >>> field_of({"meta": {"body": "x"}}, "meta.body"), field_of({"meta.body": "y"}, "meta.body")
        ('x', 'y')
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return BadRecord(f"expected an object with a field {path!r}, found {type(record).__name__}")
    value: Any = record
    for part in [path] if path in record else path.split("."):
        if not isinstance(value, dict) or part not in value:
            return BadRecord(f"no field {path!r}; the record has {', '.join(sorted(map(str, record)))[:200] or 'none'}")
        value = value[part]
    return value


def text_content(field: str) -> Reader:
    """Return the reader of texts.

    Example:
        >>> text_content("text")("a text"), text_content("text")(3)
        ('a text', BadRecord(reason="field 'text' is int, not text"))
    """

    def read(value: Any) -> Content | BadRecord:
        if _is_chat(value):
            return BadRecord(f"field {field!r} is a chat, not text (--chat-template default renders it)")
        if _are_ids(value):
            return BadRecord(f"field {field!r} is a list of numbers, not text (--token-field {field} takes token ids)")
        if not isinstance(value, str):
            return BadRecord(f"field {field!r} is {type(value).__name__}, not text")
        return _checked(value, field)

    return read


def token_content(field: str, vocabulary: int) -> Reader:
    """Return the reader of token ids, which must lie in [0, vocabulary).

    Example:
        >>> token_content("ids", 10)([3, 9]), token_content("ids", 10)([3, 10]).reason
        ([3, 9], "field 'ids' has token id 10, the model's vocabulary has 10")
    """

    def read(value: Any) -> Content | BadRecord:
        if not isinstance(value, list) or {*map(type, value)} - {int}:
            return BadRecord(f"field {field!r} is not a list of token ids")
        if value and not 0 <= min(value) <= max(value) < vocabulary:
            outside = max(value) if max(value) >= vocabulary else min(value)
            return BadRecord(f"field {field!r} has token id {outside}, the model's vocabulary has {vocabulary}")
        return value

    return read


def chat_content(field: str, render: Render) -> Reader:
    """Return the reader of chats: lists of messages, each an object with a role and a content.

    Example:
        >>> read = chat_content("chat", lambda messages: " ".join(m["content"] for m in messages))
        >>> read([{"role": "user", "content": "Hello"}])
        'Hello'
    """

    def read(value: Any) -> Content | BadRecord:
        if not _is_chat(value):
            return BadRecord(f"field {field!r} is no chat: a list of objects with role and content")
        try:
            return _checked(render(value), field)
        except ValueError as error:
            return BadRecord(f"the chat template refuses field {field!r}: {str(error)[:200]}")

    return read


def _checked(text: str, field: str) -> Content | BadRecord:
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRecord(f"field {field!r} holds half of a surrogate pair, which is not text")
    return text


def _is_chat(value: Any) -> bool:
    messages = value if isinstance(value, list) else [None]
    return bool(messages) and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not {*map(type, value)} - {int}
