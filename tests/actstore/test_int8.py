"""int8 stores: the rule's bounds, what lies in the files, what readers get back, and every refusal."""

from __future__ import annotations

import json
import os
import re
import signal
import warnings

import numpy as np
import pytest
from helpers import ROOT, flip, hostile, reopened, writable
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore import durable
from actstore.capture import capture
from actstore.catalog import list_stores, open_store
from actstore.check import check_store
from actstore.digests import sha256_bytes
from actstore.errors import FormatError, NonFiniteActivation, StoreDamaged
from actstore.int8 import MAX_ERROR, exact_dtype, parse_exact, quantise, restore
from actstore.layout import arrays_of, chunk_name
from actstore.manifest import rows_per_group
from actstore.stats import moments_of
from actstore.zarr_array import check_array_metadata, size_problem


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


def massive(n=2500, d=24, seed=0):
    """Rows with a large mean, unequal columns, and five massive rows."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * np.exp(rng.normal(size=d)) + 30).astype(np.float32)
    x[[0, 7, 1023, 1024, n - 1], 3] = 25_000
    return x


def undone(q, rows=slice(None)):
    return restore(q.codes, q.scale, q.columns, q.exact, rows)


def test_every_row_is_within_the_bound_and_massive_rows_are_exact():
    x = massive()
    q = quantise(x)
    ordinary = np.linalg.norm(x, axis=1) < 1000
    variance = x[ordinary].astype(float).var(0).sum()
    error = np.square(undone(q).astype(float) - x).sum(1) / variance
    assert error.max() <= MAX_ERROR * (1 + 1e-6) and 1e-6 < np.median(error) < 1e-4
    assert q.exact["row"].tolist() == np.flatnonzero(~ordinary).tolist() == np.flatnonzero(np.isnan(q.scale)).tolist()
    np.testing.assert_array_equal(undone(q)[~ordinary], x[~ordinary])
    assert not q.codes[~ordinary].any() and (np.abs(q.codes[ordinary].astype(int)).max(1) == 127).all()


def test_control_without_standardised_columns_massive_rows_spoil_the_rest():
    """The control: a scale a row alone leaves 25 times the error, and takes the small columns of massive rows away."""
    x = massive()
    scale = np.abs(x).max(1, keepdims=True) / 127
    plain = np.rint(x / scale) * scale
    variance = x[np.linalg.norm(x, axis=1) < 1000].astype(float).var(0).sum()
    error = np.square(plain - x).sum(1) / variance
    assert np.median(error) > 25 * np.median(np.square(undone(quantise(x)) - x).sum(1) / variance)
    assert error[0] > 1


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((3, 4), np.float32), np.ones((1, 2), np.float32), np.full((5, 3), 3e38, np.float32),
        np.array([[0, 1], [0, 2], [0, 3]], np.float32), np.array([[3e38, 0]] + [[1, 2], [2, 1]] * 9, np.float32),
        np.array([[0, 0]] * 5 + [[1, 1]], np.float32), np.array([[1e-45, 1], [0, 2]], np.float32),
    ],
)  # fmt: skip
def test_odd_row_groups_stay_finite_and_bounded(rows):
    q = quantise(rows)
    back = undone(q)
    assert np.isfinite(back).all() and (q.codes != -128).all()
    ordinary = np.linalg.norm(rows.astype(float), axis=1) <= 10 * np.median(np.linalg.norm(rows.astype(float), axis=1))
    limit = MAX_ERROR * rows[ordinary].astype(float).var(0).sum()
    assert (np.square(back.astype(float) - rows).sum(1) <= limit * (1 + 1e-6)).all()


def test_the_formula_restated():
    """One row at a time, without pieces or masks: the same codes, scales and rows."""
    x = massive(1100, 8, seed=3)
    q = quantise(x)
    ordinary = np.linalg.norm(x.astype(float), axis=1) <= 10 * np.median(np.linalg.norm(x.astype(float), axis=1))
    np.testing.assert_allclose(q.columns[0], x[ordinary].astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(q.columns[1], x[ordinary].astype(float).std(0), rtol=1e-6)
    for i in np.flatnonzero(ordinary)[:50]:
        z = (x[i] - q.columns[0]) / q.columns[1]
        scale = np.abs(z).max() / np.float32(127)
        assert scale == q.scale[i] and np.rint(z / scale).astype(int).tolist() == q.codes[i].tolist()
        want = q.codes[i].astype(np.float32) * scale * q.columns[1] + q.columns[0]
        np.testing.assert_array_equal(undone(q, np.array([i]))[0], want)


def test_quantising_is_deterministic_and_a_gather_equals_the_whole():
    x = massive()
    q, again = quantise(x), quantise(x.copy())
    for field in ("codes", "scale", "columns", "exact"):
        assert getattr(q, field).tobytes() == getattr(again, field).tobytes()
    rows = np.array([0, 0, 7, 8, 1023, 1024, 2000, len(x) - 1])
    out = np.empty((len(rows), x.shape[1]), np.float32)
    assert restore(q.codes, q.scale, q.columns, q.exact, rows, out) is out
    np.testing.assert_array_equal(out, undone(q)[rows])
    np.testing.assert_array_equal(undone(q, slice(5, 1025)), undone(q)[5:1025])
    assert undone(q, slice(3, 3)).shape == (0, 24)


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def massive_request(toy_request, monkeypatch, small_groups):
    """An int8 request whose toy model gives some massive rows."""
    from actstore.backends.toy import ToyBackend

    plain = ToyBackend.launch

    def launch(self, tokens, lengths, hooks, dtypes):
        out = plain(self, tokens, lengths, hooks, dtypes)()
        for x in out:
            x[::97, 2] *= 30_000
        return lambda: out

    monkeypatch.setattr(ToyBackend, "launch", launch)
    return lambda **fields: toy_request(**{"dtype": "int8", "batch_tokens": 320, **fields})


@pytest.fixture
def int8_store(massive_request):
    request = massive_request()
    return open_store(capture(request)[0], request.stores)


def plain_zarr(store):
    """Undo a store with nothing but the lines of the README: zarr and numpy, and not one warning."""
    lines = re.search(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    scope = {"path": store.path}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(lines, "README.md", "exec"), scope)
    return scope["x"]


def test_plain_zarr_undoes_a_store_bit_for_bit(int8_store):
    x = plain_zarr(int8_store)
    assert x.dtype == np.float32 and len(int8_store.manifest.groups) > 2 and np.isfinite(x).all()
    np.testing.assert_array_equal(x.view(np.int32), int8_store[:].view(np.int32))
    assert int8_store.acts.dtype == np.int8 and int8_store.row_dtype == np.float32 == int8_store[:3].dtype
    assert sum(len(int8_store._stored("exact", g)) for g in range(len(int8_store.manifest.groups))) > 10


def test_rows_are_those_of_the_float32_store_within_the_bound(int8_store, massive_request):
    request = massive_request(dtype="float32")
    exact = open_store(capture(request)[0], request.stores)
    assert exact.manifest.group_rows == int8_store.manifest.group_rows and exact.rows == int8_store.rows
    size = exact.manifest.group_rows
    for g in range(len(exact.manifest.groups)):
        x, back = exact.chunk("acts", g).astype(float), int8_store.chunk("acts", g)
        norms = np.linalg.norm(x, axis=1)
        variance = x[norms <= 10 * np.median(norms)].var(0).sum()
        assert (np.square(back - x).sum(1) <= MAX_ERROR * variance * (1 + 1e-6)).all()
        np.testing.assert_array_equal(int8_store[g * size : g * size + len(x)], back)
    np.testing.assert_array_equal(int8_store.read("tokens", 0, 3000), exact.read("tokens", 0, 3000))


def test_slices_and_gathers_agree(int8_store):
    whole = np.concatenate([int8_store.chunk("acts", g) for g in range(len(int8_store.manifest.groups))])
    np.testing.assert_array_equal(int8_store[1000:2100], whole[1000:2100])
    rows = np.array([0, 97, 98, 1023, 1024, 2047, int8_store.rows - 1])
    np.testing.assert_array_equal(int8_store.take("acts", rows), whole[rows])
    np.testing.assert_array_equal(int8_store.take("tokens", rows), int8_store.read("tokens", 0, int8_store.rows)[rows])
    assert int8_store[5:5].shape == (0, 16) and int8_store.take("acts", rows[:0]).shape == (0, 16)


def test_statistics_are_of_the_rows_as_read(int8_store):
    want = moments_of(int8_store[:])
    np.testing.assert_allclose(int8_store.statistics.mean, want.mean, rtol=1e-9)
    np.testing.assert_array_equal(int8_store.statistics.max_abs, want.max_abs)
    assert int8_store.statistics.total_variance == pytest.approx(want.total_variance)


def test_the_group_size_is_that_of_float32_and_other_keys_are_unchanged(toy_store):
    assert rows_per_group(1024, "int8", 10**6) == rows_per_group(1024, "float32", 10**6) < rows_per_group(1024, "float16", 10**6)
    assert arrays_of("float32") == arrays_of("bfloat16") == ("acts", "tokens", "documents", "positions")
    assert "int8" not in (toy_store.path / "key.json").read_text()


def test_a_resumed_int8_capture_has_the_same_content(massive_request, tmp_path, int8_store):
    from actstore.capture import Progress

    class StopError(Exception):
        pass

    seen = []

    def stop(rows):
        seen.append(rows)
        if sum(seen) > 1500:
            raise StopError

    request = massive_request(stores=tmp_path / "again")
    with pytest.raises(StopError):
        capture(request, Progress(on_rows=stop))
    assert list_stores(request.stores)[0].committed == 1
    again = open_store(capture(request)[0], request.stores)
    assert again.content_digest == int8_store.content_digest
    assert not check_store(again.path, data=True).findings


def test_an_unsealed_group_with_a_cut_exact_chunk_is_made_again(massive_request, tmp_path, int8_store):
    from actstore.capture import Progress

    request = massive_request(stores=tmp_path / "again")
    seen = []

    def stop(rows):
        seen.append(rows)
        if sum(seen) > 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(request, Progress(on_rows=stop))
    chunk = request.stores / ".staging" / int8_store.digest / chunk_name("exact", 0)
    chunk.chmod(0o644)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert open_store(capture(request)[0], request.stores).content_digest == int8_store.content_digest


@pytest.mark.parametrize("array", arrays_of("int8"))
def test_a_flipped_bit_in_any_array_is_found_and_never_served(int8_store, array):
    path = writable(int8_store) / chunk_name(array, 0)
    flip(path, 17)
    store = reopened(int8_store)
    with pytest.raises(StoreDamaged, match="crc32c"):
        store.read("acts" if array in ("scale", "columns", "exact") else array, 0, 1)
    assert len(check_store(store.path, data=True).findings) == 1


@pytest.mark.parametrize("damage", ["delete", "cut", "row less", "longer", "too many", "empty"])
@pytest.mark.parametrize("array", ["exact", "columns", "scale"])
def test_a_wrong_chunk_file_is_an_error(int8_store, array, damage):
    path = writable(int8_store) / chunk_name(array, 0)
    data = path.read_bytes()
    new = {
        "cut": data[:-3], "row less": data[:-68], "longer": data + b"\0", "too many": data + bytes(68 * 1100), "empty": b"",
    }.get(damage)  # fmt: skip
    path.unlink() if new is None else path.write_bytes(new)
    with pytest.raises(StoreDamaged):
        reopened(int8_store)[:1]
    assert check_store(int8_store.path, data=True).findings


def test_sizes_of_exact_chunks():
    assert (
        size_problem("exact", 12, 1000, 1024, 16, "int8") == size_problem("exact", 12 + 68 * 1000, 1000, 1024, 16, "int8") == ""
    )
    for size in (0, 11, 13, 12 + 67, 12 + 68 * 1001):
        assert "exact rows" in size_problem("exact", size, 1000, 1024, 16, "int8")


@pytest.mark.parametrize("places", [[-1], [5], [3, 3], [4, 2]])
def test_exact_rows_that_are_no_places_are_refused(places):
    exact = np.zeros(len(places), exact_dtype(2))
    exact["row"] = places
    with pytest.raises(FormatError, match="ascending"):
        parse_exact(exact.view(np.uint8), 2, 5)


def test_a_row_marked_exact_that_is_not_there_is_refused():
    q = quantise(massive())
    for exact in (q.exact[:0], q.exact[1:]):
        with pytest.raises(FormatError, match="marked exact"):
            restore(q.codes, q.scale, q.columns, exact, slice(0, 10))


def test_metadata_other_than_the_manifest_implies_is_refused(int8_store):
    manifest = int8_store.manifest
    for array in arrays_of("int8"):
        data = (int8_store.path / array / "zarr.json").read_bytes()
        check_array_metadata(array, data, manifest.rows, 16, "int8", manifest.group_rows)
        for field, value in (("codecs", []), ("data_type", "uint8"), ("fill_value", 0), ("shape", [1])):
            bad = json.dumps({**json.loads(data), field: value}).encode()
            with pytest.raises(FormatError, match=field):
                check_array_metadata(array, bad, manifest.rows, 16, "int8", manifest.group_rows)


def test_a_float32_store_with_int8_arrays_is_refused(toy_store):
    path = writable(toy_store)
    (path / "scale").mkdir()
    (path / "scale" / "zarr.json").write_bytes(b"{}")
    files = {**toy_store.manifest.files, "scale/zarr.json": sha256_bytes(b"{}")}
    (path / "manifest.json").write_bytes(hostile(toy_store.manifest, files=files))
    with pytest.raises((StoreDamaged, FormatError), match="exactly the files"):
        reopened(toy_store)


def test_non_finite_values_never_enter(toy_request, make_corpus):
    corpus = make_corpus(["fine text here " * 20, "a" * 100 + "\x01" + "b" * 300], "bad.jsonl")
    with pytest.raises(NonFiniteActivation, match="nan"):
        capture(toy_request(corpus=(corpus,), dtype="int8"))


@settings(max_examples=300, deadline=None)
@given(
    arrays(
        np.float32, st.tuples(st.integers(1, 12), st.integers(1, 5)),
        elements=st.one_of(
            st.floats(-(2.0**127), 2.0**127, width=32),
            st.floats(-10, 10, width=32),
            st.sampled_from([0.0, -0.0, 1e-45, 2e-43, 1e-38, 3.4e38, -3.4e38]).map(lambda v: float(np.float32(v))),
        ),
    )
)  # fmt: skip
def test_any_finite_rows_come_back_within_the_bound(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = quantise(rows)
        back = undone(q)
    x = rows.astype(np.longdouble)
    norms = np.sqrt((x**2).sum(1))
    variance = x[norms <= 10 * np.median(norms)].var(0).sum()
    assert np.isfinite(back).all() and (q.codes != -128).all()
    assert (((back - x) ** 2).sum(1) <= MAX_ERROR * variance * (1 + 1e-5)).all()


def test_the_rule_gives_the_bytes_it_gave():
    """A change of the rule, of its order of sums too, is a new stored dtype: content digests of old captures would differ."""
    x = ((np.arange(1500 * 24, dtype=np.int64) * 2654435761 % 20011).reshape(1500, 24) / 16 - 300).astype(np.float32)
    x[[5, 700], 3] = 1e6
    q = quantise(x)
    whole = b"".join(part.tobytes() for part in (q.codes, q.scale, q.columns, q.exact))
    assert sha256_bytes(whole) == "bc8ce68135b61ab8bce845965e7b8b79c33e052f39bae91836be9239abb1e869"


def test_killed_at_steps_an_int8_capture_resumes_to_the_same_content(massive_request, tmp_path, int8_store):
    names: list[str] = []
    durable.step_hook = lambda name, path: names.append(name)
    capture(massive_request(stores=tmp_path / "count"))
    durable.step_hook = None
    for at in range(3, len(names), len(names) // 8):
        request = massive_request(stores=tmp_path / f"killed{at}")
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            count = iter(range(10**9))
            durable.step_hook = lambda name, path, at=at, count=count: (
                os.kill(os.getpid(), signal.SIGKILL) if next(count) == at else None
            )
            try:
                capture(request)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        store = open_store(capture(request)[0], request.stores)
        assert store.content_digest == int8_store.content_digest and not check_store(store.path, data=True).findings
