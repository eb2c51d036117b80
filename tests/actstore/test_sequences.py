from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.corpus import Document
from actstore.errors import CorpusError, KeyMismatch
from actstore.key import SequenceRule
from actstore.sequences import Sequences, tokenized


def make_sequences(documents, rule, bos, rows=None):
    sequences = Sequences(rule, bos, rows)
    sequences.read(documents)
    return sequences


DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(2, 9), st.booleans())
def test_pack_keeps_every_token_in_order_but_the_last_incomplete_sequence(documents, seq_len, bos):
    rule = SequenceRule(packing="pack", seq_len=seq_len, bos=bos)
    flat = [(t, i) for i, d in enumerate(documents) for t in d]
    body = seq_len - bos
    if len(flat) < body:
        with pytest.raises(CorpusError, match="0 sequences"):
            make_sequences(enumerate(documents), rule, bos=0)
        return
    s = make_sequences(enumerate(documents), rule, bos=0)
    grid = s.tokens.reshape(-1, seq_len)
    kept = len(flat) // body * body
    assert grid[:, int(bos) :].ravel().tolist() == [t for t, _ in flat[:kept]]
    owners = s.documents.reshape(-1, seq_len)
    assert owners[:, int(bos) :].ravel().tolist() == [i for _, i in flat[:kept]]
    assert not bos or ((grid[:, 0] == 0).all() and (owners[:, 0] == owners[:, 1]).all())
    assert s.positions(0, s.rows).tolist() == list(range(seq_len)) * len(grid)


@given(DOCUMENTS, st.integers(2, 9), st.booleans())
def test_truncate_keeps_the_first_tokens_of_each_document(documents, seq_len, bos):
    s = make_sequences(enumerate(documents), SequenceRule(packing="truncate", seq_len=seq_len, bos=bos), bos=0)
    got = [s.tokens[a:b].tolist() for a, b in zip(s.starts, s.starts[1:], strict=False)]
    assert got == [[0] * bos + d[: seq_len - bos] for d in documents]
    for start in range(s.rows):
        first, last = s.covering(start, start + 1)
        assert s.starts[first] <= start < s.starts[last]


def test_rows_end_the_reading_and_too_few_are_refused():
    rule = SequenceRule(packing="pack", seq_len=4, bos=True)
    read = []

    def documents():
        for i in range(100):
            read.append(i)
            yield i, [1, 2, 3]

    assert make_sequences(documents(), rule, bos=0, rows=8).rows == 8 and len(read) == 2
    with pytest.raises(CorpusError, match="400 rows, 401"):
        make_sequences(documents(), rule, bos=0, rows=401)


def test_a_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(KeyMismatch, match="outside"):
        list(tokenized([Document(0, "x")], lambda texts: [[5, 300]], vocabulary=256))


def test_positions_are_int32():
    s = make_sequences([(0, [1, 2, 3, 4])], SequenceRule(packing="pack", seq_len=2, bos=False), None)
    assert s.positions(1, 4).tolist() == [1, 0, 1] and s.positions(0, 1).dtype == np.int32
