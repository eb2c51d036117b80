"""Promise 12: old stores stay readable. Every format version has golden stores; an unknown version is refused by number.

The stores under tests/golden/v1 are committed and never made again (tests/golden/make.py). What they must hold is
restated here: digests as constants, and the toy model's formula written out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import zarr
from golden.make import GOLDEN, REQUESTS, TABLED, request
from helpers import flip, writable

import actstore.bfloat16  # noqa: F401 - zarr reads the type once this is imported
from actstore.capture import capture
from actstore.check import check_store
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError, StoreDamaged
from actstore.int8 import MAX_ERROR
from actstore.key import parse_key
from actstore.manifest import parse_manifest, parse_row_group
from actstore.reader import Store, open_folder
from actstore.stats import describe_norms

# name: store digest, content digest, SHA-256 of all rows as read, rows
EXPECTED = {
    "float32-first": (
        "242bcdd7d76e4b4c259e944496506d0f905878a069b41b2eda860fad84178ec4",
        "26223621efbb60a01626a2590afd183819bdd27fbd134cbb87a3e290b4292eed",
        "2bf13aea41265d3be30a760c39e394eff5660a0507c23a855065dc6cd14dd1ae", 1000,
    ),
    "float32": (
        "1e5656482c01581bed091a40995b2ea07f4455efee5c29360d252e3e5a4c3d36",
        "5cd4d6ad15ccfc41c0873161470f55f032a4d2ec6d00d44ca94c94c4aade7dfe",
        "c5aa09d347c714dfc263252d78cc9b013c225845e761d0978bfae1677b138981", 1000,
    ),
    "float16": (
        "a947083db88e14de550ea9fddfe1b1554f4f90799e97775eec690b3fbabb5698",
        "1f83f32d03589fa19b27933dcc0dbe67af872d22ea02c6c27ae351e46583feeb",
        "7b4fc9d9160e2a8ac98c92a17464ce862482b96b0205fe5a8827c26aea012340", 1000,
    ),
    "bfloat16": (
        "ceaa7353a072552cd205e7f20fb0c67f673184223db2143633328a88aaede628",
        "b8ab71a31b40fefd215850f6f13dcc01cabef83a765dd7812f1a921c8b049886",
        "7a17da1b868ca155eb5746f9244e367b463dfcc78f6725b7b25084a5b23b1b12", 1000,
    ),
    "int8": (
        "4e4922c68921ac626151f9a7f84d0383cd0cad7c2f38895a902e02d5cc5dbb35",
        "a3f8ee8f031af7972f953ad30e4d2c9ace048bfabc524262915c080cfddbc740",
        "8a907d59c8a6c0b3d623bfb689829f6dd86a891e63cc8bec218ab7cebe8e4998", 1000,
    ),
    "truncate": (
        "135fb124f5374b4dc7ee60a59ac7daed3bdc0cdbf73eae3d7bf6e9e688bd25b8",
        "2d86be000de2464b6766786af16f12637be94a57feae0d4729ae044f8b8bf6e1",
        "1bafdccdbdef7bf450467bb935ae5949eb13f1d34f89831e58b4a455a89bedbe", 960,
    ),
}  # fmt: skip
BOS = 256


@pytest.fixture(params=EXPECTED)
def name(request) -> str:
    return request.param


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden store that a test may damage."""

    def make(name: str) -> Store:
        folder = tmp_path / EXPECTED[name][0]
        shutil.copytree(golden(name).path, folder)
        writable(open_folder(folder))
        return open_folder(folder)

    return make


def golden(name: str) -> Store:
    return open_folder(GOLDEN / "v1" / EXPECTED[name][0])


def expected_tokens(name: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens, documents and positions, by hand: bytes of the texts, packed or truncated, BOS or none."""
    fields = REQUESTS[name]
    lines = (GOLDEN / fields["corpus"]).read_text().splitlines()
    texts = [json.loads(line)["text"].encode() for line in lines]
    if name == "truncate":
        return (
            [t for text in texts for t in text[:24]],
            [i for i, text in enumerate(texts) for _ in text[:24]],
            [p for text in texts for p in range(len(text[:24]))],
        )
    stream = [(t, i) for i, text in enumerate(texts) for t in text]
    sequences = [[(BOS, stream[at][1]), *stream[at : at + 31]] for at in range(0, len(stream) - 30, 31)]
    rows = [(t, i, p) for sequence in sequences for p, (t, i) in enumerate(sequence)][:1000]
    tokens, documents, positions = zip(*rows, strict=True)
    return list(tokens), list(documents), list(positions)


def expected_rows(name: str) -> np.ndarray:
    """The toy's formula, a row at a time, float64: the mean embedding of the sequence so far, times the hook's place."""
    place = 2 if REQUESTS[name]["hooks"] == ("blocks.0.hook_resid_pre",) else 3
    tokens, _, positions = expected_tokens(name)
    out, total = [], np.zeros(4)
    for token, position in zip(tokens, positions, strict=True):
        embedding = np.array([np.sin((token + 1) * (j + 1) * 0.7) for j in range(4)])
        total = embedding if position == 0 else total + embedding
        out.append(np.full(4, 65520.0) if token == 2 else total / (position + 1) * place)
    return np.array(out)


def compare(store: Store, name: str) -> None:
    """The comparison that the control must see fail."""
    _, content, rows_digest, n = EXPECTED[name]
    rows = store[:]
    assert store.content_digest == content and store.rows == n == len(rows)
    assert hashlib.sha256(rows.tobytes()).hexdigest() == rows_digest
    tokens, documents, positions = expected_tokens(name)
    assert store.read("tokens", 0, n).tolist() == tokens
    assert store.read("documents", 0, n).tolist() == documents
    assert store.read("positions", 0, n).tolist() == positions
    want = expected_rows(name)
    if name == "int8":
        ordinary = want[:, 0] < 60_000
        error = np.square(rows - want).sum(1) / want[ordinary].var(0).sum()
        assert error.max() <= MAX_ERROR * 1.001 and (rows[~ordinary] == 65520).all() and (~ordinary).sum() == 2
    else:
        rtol = {"float16": 2**-10, "bfloat16": 2**-7}.get(name, 1e-5)
        np.testing.assert_allclose(rows.astype(np.float64), want, rtol=rtol, atol=rtol)


def test_a_golden_store_holds_what_it_held(name):
    store = golden(name)
    compare(store, name)
    assert not check_store(store.path, data=True).findings
    assert store.dtype == REQUESTS[name].get("dtype", "float32") and store.key.format == 1
    assert store.statistics.rows == store.rows and len(store.vocabulary.tokens) == 257


def test_the_golden_store_of_format_2_is_that_of_format_1_but_for_its_table():
    digest, content, *_ = EXPECTED[TABLED]
    store = open_folder(GOLDEN / "v2" / digest)
    compare(store, TABLED)
    assert (store.manifest.format, golden(TABLED).manifest.format, store.content_digest) == (2, 1, content)
    table = (store.path / "row_groups.bin").read_bytes()
    assert table.hex() == json.loads((golden(TABLED).path / "manifest.json").read_bytes())["groups"][0]
    assert not check_store(store.path, data=True).findings and {p.name for p in (GOLDEN / "v2").iterdir()} == {digest}


def test_plain_zarr_reads_the_same(name):
    store = golden(name)
    group = zarr.open_group(store.path, mode="r")
    rows = group["acts"][:]
    if name == "int8":
        rows = rows * group["scale"][:][:, None] * group["columns"][0, 1] + group["columns"][0, 0]
        kept = np.frombuffer(group["exact"][:][0], [("row", "<i4"), ("acts", "<f4", 4)])
        rows[kept["row"]] = kept["acts"]
    if name == "bfloat16":
        assert rows.dtype == ml_dtypes.bfloat16
    assert hashlib.sha256(rows.tobytes()).hexdigest() == EXPECTED[name][2]
    assert group["tokens"][:].tolist() == store.read("tokens", 0, store.rows).tolist()


def test_the_same_request_still_has_the_same_key(name, tmp_path):
    """No field was added to the key or changed its spelling since the store was made."""
    assert capture(request(name, tmp_path), dry_run=True) == [EXPECTED[name][0]]
    data = (golden(name).path / "key.json").read_bytes()
    assert sha256_bytes(data) == EXPECTED[name][0] and canonical_json(parse_key(data).model_dump()) == data


def test_norms_are_recorded_but_by_the_first_code(name):
    assert (describe_norms(golden(name).statistics)["norm_p50"] is None) == (name == "float32-first")


def test_a_folder_has_just_the_stores_that_are_expected():
    assert {p.name for p in (GOLDEN / "v1").iterdir()} == {digests[0] for digests in EXPECTED.values()}
    assert EXPECTED.keys() == REQUESTS.keys()


@pytest.mark.parametrize("array", ["acts", "tokens"])
def test_control_a_changed_byte_makes_the_comparison_fail(copy, monkeypatch, array):
    store = copy("float32-first")
    compare(store, "float32-first")
    flip(store.path / array / ("c.0.0" if array == "acts" else "c.0"), 21)
    with pytest.raises(StoreDamaged):
        compare(open_folder(store.path), "float32-first")
    monkeypatch.setattr(
        "actstore.mapped._crc32c", lambda descriptor, size: int.from_bytes(os.pread(descriptor, 4, size), "little")
    )
    with pytest.raises(AssertionError):  # the reader's check off: the test's own comparison sees it
        compare(open_folder(store.path), "float32-first")


def resealed(data: bytes, **fields) -> bytes:
    body = {**json.loads(data), **fields}
    body.pop("digest", None)
    return canonical_json({**body, "digest": sha256_bytes(canonical_json(body))})


@pytest.mark.parametrize("version", [0, 2, 99])
def test_an_unknown_version_is_refused_by_both_numbers(copy, version):
    store = copy("float32")
    both = rf"format version {version}\b.*reads version 1\b"
    manifest = (store.path / "manifest.json").read_bytes()
    record = (store.path / "row_groups" / "0.json").read_bytes()
    key = json.loads((store.path / "key.json").read_bytes())
    if version != 2:  # the manifest has it; see tests/actstore/test_manifest.py
        with pytest.raises(FormatError, match=both.replace("1", "1 or 2")):
            parse_manifest(resealed(manifest, format=version))
    with pytest.raises(FormatError, match=both):
        parse_row_group(resealed(record, format=version), "row_groups/0.json", 4, "float32")
    with pytest.raises(FormatError, match=both):
        parse_key(canonical_json({**key, "format": version}))
    (store.path / "manifest.json").write_bytes(resealed(manifest, format=version))
    for read in (open_folder, check_store):
        with pytest.raises(FormatError, match="format 2 keeps them in" if version == 2 else both):
            read(store.path)
    parse_manifest(resealed(manifest))  # the control: resealed with its own version it is read
