from __future__ import annotations

import gzip
import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from actstore.corpus import ReadReport, find_files, identify_dataset, identify_files, read_documents
from actstore.errors import CorpusError, UsageError
from actstore.key import HubCorpus


def read(paths, field="text", bad="error", limit=None):
    files = find_files(paths)
    report = ReadReport()
    return [(d.index, d.text) for d in read_documents(identify_files(files), files, field, bad, limit, report)], report


def test_every_format_gives_the_same_documents(tmp_path):
    texts = ["first text", "zweiter Text: äöü", "third\nwith lines"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    for i, text in enumerate(texts):
        (tmp_path / f"d{i}.txt").write_text(text)
    expected = list(enumerate(texts))
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert read([tmp_path / name])[0] == expected
    assert read([tmp_path / f"d{i}.txt" for i in range(3)])[0] == expected
    folder, _ = read([tmp_path])
    assert [t for _, t in folder] == texts * 4 and [i for i, _ in folder] == list(range(12))


def test_the_digest_of_one_file_is_its_sha256(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text":"x"}\n')
    corpus = identify_files([tmp_path / "a.jsonl"])
    assert corpus.digest == hashlib.sha256(b'{"text":"x"}\n').hexdigest()
    assert corpus.files[0].bytes == 13


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{broken", "JSON"), (b"[1]", "object"), (b'{"txt":"x"}', "no field 'text'"), (b'{"text":5}', "int"),
        (b'{"text":"\xff"}', "UTF-8"), (b'\xef\xbb\xbf{"text":"x"}', "BOM"), (b'{"text":"\\ud800"}', "surrogate"),
        (b'{"text":"a\x00b"}', "JSON"), (b"[" * 5000, "JSON"), (b'{"text":"a","n":' + b"9" * 5000 + b"}", "JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_names_file_and_line_or_is_skipped_and_counted(tmp_path, line, reason):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text":"good"}\r\n' + line + b'\n{"text":"also good"}')
    with pytest.raises(CorpusError, match=reason) as caught:
        read([path])
    assert caught.value.where == f"{path}:2"
    documents, report = read([path], bad="skip")
    assert documents == [(0, "good"), (2, "also good")] and report.bad == 1


def test_empty_documents_are_counted_and_limits_end_the_reading(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text":""}\n\n{"text":"  "}\n{"text":"a"}\n{"text":"b"}\n{broken')
    documents, report = read([path], limit=2)
    assert documents == [(3, "a"), (4, "b")] and report.empty == 3


def test_a_dotted_field_reaches_into_objects(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"data":{"body":"x"}}\n{"data.body":"y"}\n')
    assert [t for _, t in read([path], field="data.body")[0]] == ["x", "y"]


def test_paths_that_cannot_be_meant(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="does not exist"):
        find_files([tmp_path / "no.jsonl"])
    with pytest.raises(UsageError, match="suffix"):
        find_files([tmp_path / "x.bin"])
    with pytest.raises(CorpusError, match="no file"):
        find_files([tmp_path / "empty"])


def test_damaged_containers_are_corpus_errors(tmp_path):
    whole = gzip.compress(b'{"text":"x"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.parquet").write_bytes(b"not parquet at all")
    for name in ("cut.jsonl.gz", "not.parquet"):
        with pytest.raises(CorpusError):
            read([tmp_path / name])


def test_a_hub_dataset_offline_says_what_to_do():
    with pytest.raises(UsageError) as caught:
        identify_dataset("NeelNanda/pile-10k", None, "train", None)
    assert "--corpus" in caught.value.do


def test_a_streamed_dataset_gives_documents(tmp_path):
    """`datasets` streams a local folder by the same call as a hub dataset."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text":"one"}\n{"text":""}\n{"text":"three"}\n')
    corpus = HubCorpus(dataset=str(tmp_path / "data"), split="train", revision="main")
    report = ReadReport()
    documents = [(d.index, d.text) for d in read_documents(corpus, [], "text", "error", None, report)]
    assert documents == [(0, "one"), (2, "three")] and report.empty == 1
    with pytest.raises(CorpusError, match="no field 'body'"):
        list(read_documents(corpus, [], "body", "error", None, ReadReport()))
