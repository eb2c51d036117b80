"""docs/format.md is enough to write another reader: docs/reader.py is one, and shares no line of code with actstore."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
from helpers import ROOT, flip, words, write_jsonl

from actstore import limits
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.key import CorpusFile, HubCorpus, LocalCorpus, ModelIdentity, SequenceRule, StoreKey
from actstore.manifest import Chunk, Manifest, RowGroup
from actstore.stats import dump_moments, no_rows
from trainer.config import SaeConfig
from trainer.saved import About, Commit, OtherStore, Result

DOCUMENT, READER = (ROOT / "docs" / "format.md").read_text(), ROOT / "docs" / "reader.py"
GOLDEN = sorted((ROOT / "tests" / "golden").glob("v*/" + "?" * 64))
spec = importlib.util.spec_from_file_location("reader", READER)
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)


def same_rows(folder) -> dict:
    """Compare everything that the reader returns with what actstore returns, bit for bit."""
    manifest, arrays = reader.open_store(folder)
    store = open_store(folder)
    assert manifest["content_digest"] == store.content_digest and manifest["rows"] == store.rows
    assert arrays["acts"].astype("<f4").tobytes() == store[:].astype("<f4").tobytes()
    for name in ("tokens", "documents", "positions"):
        assert np.array_equal(arrays[name], store.read(name, 0, store.rows))
    return manifest


def test_the_reader_uses_nothing_of_actstore():
    found = set()
    for node in ast.walk(ast.parse(READER.read_text())):
        found |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert found == {"hashlib", "json", "struct", "sys", "pathlib", "google_crc32c", "numpy"}
    code = [line for line in READER.read_text().splitlines() if line.strip()]
    assert len(code) < 110 and "reader.py" in DOCUMENT


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: f"{p.parent.name}-{p.name[:8]}")
def test_golden_stores(folder):
    assert same_rows(folder)["format"] == int(folder.parent.name[1])


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Fresh stores of three row groups, the last one short, massive rows among them."""
    folder = tmp_path_factory.mktemp("format")
    texts = words(56, 40)
    texts[3] += "\x02"  # the toy makes such a byte a row of 65,520
    corpus, found = write_jsonl(folder / "corpus.jsonl", texts), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1 << 16)  # 1,024 rows a row group at this width
        for dtype in ("float32", "bfloat16", "int8"):
            request = CaptureRequest(
                model="toy:16", hooks=("blocks.1.hook_resid_pre",), corpus=(corpus,), seq_len=64, backend="toy", dtype=dtype,
                rows=2500, stores=folder / "stores",
            )  # fmt: skip
            found[dtype] = folder / "stores" / capture(request)[0]
        yield found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_fresh_store(captured, dtype):
    manifest = same_rows(captured[dtype])
    assert len(manifest["groups"]) == (2 if dtype == "bfloat16" else 3) and manifest["rows"] == 2500
    if dtype == "int8":
        sizes = {p.name: p.stat().st_size for p in (captured[dtype] / "exact").glob("c.*")}
        assert sorted(sizes) == ["c.0", "c.1", "c.2"] and max(sizes.values()) > 12  # there are exact rows


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_one_flipped_byte_in_any_file_is_found(captured, dtype, tmp_path):
    folder = tmp_path / captured[dtype].name
    shutil.copytree(captured[dtype], folder)
    reader.open_store(folder)  # the control
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(files) == 3 * (5 if dtype == "float32" else 8) + 4 + (4 if dtype == "float32" else 7)
    for path in files:
        path.chmod(0o644)
        for at in {0, path.stat().st_size // 2, path.stat().st_size - 2}:
            flip(path, at)
            with pytest.raises(ValueError):
                reader.open_store(folder)
            flip(path, at)
    reader.open_store(folder)


@pytest.mark.parametrize(
    "record",
    [
        Manifest, RowGroup, Chunk, StoreKey, ModelIdentity, CorpusFile, LocalCorpus, HubCorpus, SequenceRule, SaeConfig, About,
        OtherStore, Result, Commit,
    ],
    ids=lambda r: r.__name__,
)  # fmt: skip
def test_every_field_is_in_the_document(record):
    names = record.model_fields if hasattr(record, "model_fields") else [f.name for f in fields(record)]
    assert [n for n in names if not re.search(rf"^\| `{n}`|`{n}`", DOCUMENT, re.MULTILINE)] == []


def test_fields_of_statistics_and_limits_are_those_of_the_code():
    assert all(f"`{name}`" in DOCUMENT for name in dump_moments(no_rows(3)))
    rows = re.findall(r"^\| `(MAX_\w+|MIN_\w+)` \| ([\d,]+)", DOCUMENT, re.MULTILINE)
    assert len(rows) >= 8 and all(getattr(limits, name) == int(value.replace(",", "")) for name, value in rows)


def test_the_examples_of_the_document_are_true():
    """Its worked example is the golden bfloat16 store."""
    folder = next(p for p in GOLDEN if p.name.startswith("ceaa7353"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for value in (manifest["store"], manifest["content_digest"], manifest["groups"][0], manifest["digest"]):
        assert value in DOCUMENT
    assert (folder / "key.json").read_text() in DOCUMENT
    record = json.loads((folder / "row_groups" / "0.json").read_bytes())
    identity = {name: record[name] for name in ("store", "index", "rows", "chunks")}
    assert reader.canonical(identity).decode() in DOCUMENT
