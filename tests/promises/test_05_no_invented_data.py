"""Promise 5: missing is an error, never zeros; NaN, Inf and overflow never enter a store; padding never comes out."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from harness.stores import GROUP_ROWS, tiny_store

from actstore.backends.toy import ToyBackend
from actstore.capture import capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.errors import NonFiniteActivation, StoreDamaged
from actstore.layout import arrays_of, chunk_name
from actstore.pipeline import to_stored
from actstore.reader import open_folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", GROUP_ROWS * 8)
    return tiny_store(tmp_path)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("array", arrays_of("float32"))
def test_a_missing_chunk_is_an_error_not_zeros(store, array, group):
    expected = store.read(array, 0, store.rows).copy()
    late = open_folder(store.path)
    (store.path / chunk_name(array, group)).unlink()
    with pytest.raises(StoreDamaged, match="missing"):
        open_folder(store.path)
    with pytest.raises(StoreDamaged, match="missing"):  # deleted after opening
        late.take(array, np.array([group * GROUP_ROWS]))
    other = (1 - group) * GROUP_ROWS
    np.testing.assert_array_equal(late.read(array, other, other + 400), expected[other : other + 400])
    if array == "acts":  # the control: this is what a plain Zarr reader makes of it
        assert np.isnan(zarr.open_group(store.path, mode="r")["acts"][group * GROUP_ROWS]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_place_lets_a_non_finite_value_in(value, dtype):
    for row in range(7):
        for column in range(3):
            acts = np.ones((7, 3), np.float32)
            acts[row, column] = value
            with pytest.raises(NonFiniteActivation) as caught:
                to_stored(acts, dtype, "blocks.0", 100)
            assert f"row {100 + row}, dimension {column}" in caught.value.where and "blocks.0" in caught.value.where


@pytest.mark.parametrize(
    "dtype, largest, beyond", [("float16", 65504.0, 65520.0), ("bfloat16", 3.3895e38, 3.4e38), ("float32", 3.4e38, 1e39)]
)
def test_overflow_is_refused_and_the_largest_value_kept(dtype, largest, beyond):
    source = np.float64 if dtype == "float32" else np.float32
    assert np.isfinite(to_stored(np.full((2, 2), largest, source), dtype, "h", 0).astype(np.float64)).all()
    with pytest.raises(NonFiniteActivation, match="beyond the range"):
        to_stored(np.full((1, 1), beyond, source), dtype, "h", 0)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_model_that_goes_wrong_at_any_row_seals_nothing(toy_request, make_corpus, place):
    text = {"first": "\x01" + "a" * 200, "middle": "a" * 100 + "\x01" + "b" * 100, "last": "a" * 199 + "\x01"}[place]
    request = toy_request(corpus=(make_corpus([text], "bad.jsonl"),), seq_len=3)
    with pytest.raises(NonFiniteActivation):
        capture(request)
    assert not any(line.sealed for line in list_stores(request.stores))


def test_padding_never_comes_out(store):
    assert store.rows == 1500 < 2 * GROUP_ROWS and store.chunk("acts", 1).shape == (1500 - GROUP_ROWS, 2)
    assert len(store[:]) == len(store.read("tokens", 0, 10**9)) == 1500
    assert np.isfinite(store[:]).all() and (store.read("tokens", 0, 1500) >= 0).all()
    for rows in ([1500], [2047], [-1]):
        with pytest.raises(IndexError):
            store.take("acts", np.array(rows))


def test_zeros_are_stored_and_come_back_as_zeros(toy_request, monkeypatch):
    """An all-zero chunk is written like any other; Zarr's own writer would leave it out."""
    monkeypatch.setattr(
        ToyBackend, "launch", lambda self, tokens, lengths, hooks, dtypes: lambda: [np.zeros((sum(lengths), 16), np.float32)]
    )
    request = toy_request()
    store = open_store(capture(request)[0], request.stores)
    assert (store.path / chunk_name("acts", 0)).stat().st_size == 4 + 4 * 16 * store.manifest.group_rows
    assert not store[:].any() and store[:].dtype == np.float32 and not check_store(store.path, data=True).findings
