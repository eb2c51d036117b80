from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.digests import canonical_json, check_prefix, parse_json
from actstore.errors import FormatError, UsageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(JSON)
def test_canonical_json_round_trips(value):
    assert parse_json(canonical_json(value), "x") == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b'"\\ud800"', b"\xff", b"", b"[" * 100_000, b"9" * 5000, b"{'a':1}", b"1 2",
        b"[1e999]", b"-1e400",
    ],
)  # fmt: skip
def test_strict_json_refuses(data):
    with pytest.raises(FormatError):
        parse_json(data, "x")


@pytest.mark.parametrize("text", ["", "abc", "../etc", "/etc/passwd", "ABCD", "abcg", "a" * 65, "abcd\0", "abcd\n", "ａｂｃｄ"])
def test_only_hexadecimal_prefixes_pass(text):
    with pytest.raises(UsageError):
        check_prefix(text)


@given(st.text())
def test_a_prefix_that_passes_is_never_a_path(text):
    with contextlib.suppress(UsageError):
        assert set(check_prefix(text)) <= set("0123456789abcdef") and len(text) >= 4
