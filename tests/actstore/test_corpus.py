from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import importlib
import json
import lzma
import os
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from actstore.catalog import list_stores
from actstore.content import chat_content, text_content, token_content
from actstore.corpus import ReadReport, find_files, identify_dataset, identify_files, read_documents
from actstore.errors import CorpusError, UsageError
from actstore.key import HubCorpus
from actstore.records import HubStream, file_records

capture_module = importlib.import_module("actstore.capture")  # the package has a function of that name


def read(paths, field="text", bad="error", limit=None, content=None):
    files = find_files(paths)
    report = ReadReport()
    identify_files(files)
    found = read_documents(file_records(files), field, content or text_content(field), bad, limit, report)
    return [(d.index, d.content) for d in found], report


def test_every_format_gives_the_same_documents(tmp_path):
    texts = ["first text", "zweiter Text: äöü", "third\nwith lines"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    for i, text in enumerate(texts):
        (tmp_path / f"d{i}.txt").write_text(text)
    (tmp_path / "e.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "f.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for name, delimiter in (("g.csv", ","), ("h.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["n", "text"], *enumerate(texts)])
    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(tmp_path / "i.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "j.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    expected = list(enumerate(texts))
    names = [p.name for p in sorted(tmp_path.iterdir()) if p.suffix != ".txt"]
    assert len(names) == 9
    for name in names:
        assert read([tmp_path / name])[0] == expected, name
    assert read([tmp_path / f"d{i}.txt" for i in range(3)])[0] == expected
    folder, _ = read([tmp_path])
    assert [t for _, t in folder] == texts * 10 and [i for i, _ in folder] == list(range(30))


def test_a_folder_that_datasets_saved_is_read_by_its_arrow_files_alone(tmp_path):
    import datasets

    texts = [f"document {i}" for i in range(100)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved", num_shards=3)
    assert [t for _, t in read([tmp_path / "saved"])[0]] == texts
    shuffled = datasets.Dataset.from_dict({"text": texts}).shuffle(0).select(range(7))
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert [t for _, t in read([tmp_path / "shuffled"])[0]] == shuffled["text"]
    datasets.DatasetDict(train=shuffled, test=shuffled).save_to_disk(tmp_path / "splits")
    with pytest.raises(UsageError, match="2 splits: test, train"):
        find_files([tmp_path / "splits"])
    assert len(read([tmp_path / "splits" / "train"])[0]) == 7


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.csv", b"n,text\n1,x\n2\n", r"a\.csv:3: 1 fields, the first line names 2"),
        ("a.csv", b'n,text\n1,"x', r"a\.csv:\d: .*not a readable table"),
        ("a.csv", b"n,text\n1,\xff\n", "surrogate pair"),
        ("a.csv", b"n,body\n1,x\n", "no field 'text'; the record has body, n"),
        ("a.arrow", b"no arrow at all", "not a readable Arrow file"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00 cut", "cannot be read"),
        ("a.jsonl.bz2", b"BZh9 cut", "cannot be read"),
    ],
)
def test_damage_in_every_format_is_a_corpus_error_with_its_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError) as caught:
        read([tmp_path / name])
    assert re.search(words, f"{caught.value.where}: {caught.value.what}") and name in str(caught.value)


def test_token_ids_are_taken_as_they_are_and_checked(tmp_path):
    lines = [{"ids": [5, 6, 7]}, {"ids": []}, {"ids": [8]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents, report = read([tmp_path / "a.jsonl"], "ids", content=token_content("ids", 9))
    assert documents == [(0, [5, 6, 7]), (2, [8])] and report.empty == 1
    refused = {
        "[5, 9]": "token id 9, the model's vocabulary has 9", "[-1]": "token id -1", "[1.0]": "not a list of token",
        '"x"': "not a list of token", "[true]": "not a list of token", "[[1]]": "not a list of token",
    }  # fmt: skip
    for value, words in refused.items():
        (tmp_path / "b.jsonl").write_text(f'{{"ids":{value}}}\n')
        with pytest.raises(CorpusError, match=words):
            read([tmp_path / "b.jsonl"], "ids", content=token_content("ids", 9))
    with pytest.raises(CorpusError, match="--token-field ids takes token ids"):
        read([tmp_path / "a.jsonl"], "ids")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_chats_are_rendered_and_what_is_none_is_bad(tmp_path):
    def render(messages):
        if messages[0]["role"] != "user":
            raise ValueError("must begin with the user")
        return "|".join(m["content"] for m in messages)

    content = chat_content("messages", render)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    assert read([tmp_path / "a.jsonl"], "messages", content=content)[0] == [(0, "Hi|Hello")]
    with pytest.raises(CorpusError, match="--chat-template default renders it"):
        read([tmp_path / "a.jsonl"], "messages")
    for value, words in (
        (CHAT[1:], "refuses field 'messages': must begin"), ("Hi", "no chat"), ([], "no chat"), ([{}], "no chat"),
        ([{"role": 1, "content": "x"}], "no chat"),
    ):  # fmt: skip
        (tmp_path / "b.jsonl").write_text(json.dumps({"messages": value}) + "\n")
        with pytest.raises(CorpusError, match=words):
            read([tmp_path / "b.jsonl"], "messages", content=content)


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
    text = text_content("text")
    documents = [(d.index, d.content) for d in read_documents(HubStream(corpus).records(), "text", text, "error", None, report)]
    assert documents == [(0, "one"), (2, "three")] and report.empty == 1
    with pytest.raises(CorpusError, match="no field 'body'"):
        list(read_documents(HubStream(corpus).records(), "body", text_content("body"), "error", None, ReadReport()))


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"text":"\xc3\xa9" x}', "byte 14 of the line"), (b'{"text":"ab\xff"}', "byte 12 of the line"),
        (b'{"text":"a\x00b"}', "byte 11 of the line"), (b'{"text":"a', "byte 9 of the line"),
    ],
)  # fmt: skip
def test_a_bad_line_names_the_byte(tmp_path, line, words):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text":"good"}\n' + line)  # no newline at the end: still a line
    with pytest.raises(CorpusError, match=words) as caught:
        read([path])
    assert caught.value.where == f"{path}:2"


def test_line_ends_and_escapes_that_are_fine(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'{"text":"crlf"}\r\n{"text":"nul \\u0000 inside"}\n{"text":"pair \\ud83d\\ude00"}\n\r\n{"text":"no newline"}'
    )
    documents, report = read([path])
    assert [t for _, t in documents] == ["crlf", "nul \0 inside", "pair 😀", "no newline"] and report.empty == 1


@pytest.mark.parametrize("name", ["bad.jsonl.gz", "cut.jsonl.gz"])
def test_a_damaged_gzip_stream_is_a_corpus_error(tmp_path, name):
    data = gzip.compress(b'{"text":"x"}\n' * 1000)
    (tmp_path / name).write_bytes(data[:30] + b"\xff" * 40 + data[70:] if name.startswith("bad") else data[:-5])
    with pytest.raises(CorpusError, match="cannot be read"):
        read([tmp_path / name])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_corpus_that_never_ends_or_never_begins_is_refused_at_once(tmp_path, make):
    make(tmp_path / "c.jsonl")
    with pytest.raises(CorpusError, match="regular file"):
        find_files([tmp_path / "c.jsonl"])


HUGE_LINE = """
import resource, sys, time
from pathlib import Path
from actstore.catalog import list_stores
from actstore.content import text_content
from actstore.corpus import ReadReport, identify_files, read_documents
from actstore.errors import CorpusError
from actstore.records import file_records
path = Path(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    list(read_documents(file_records([path]), "text", text_content("text"), sys.argv[2], None, ReadReport()))
except CorpusError as error:
    print(error)
assert identify_files([path]).files[0].bytes == 1 << 30
"""


@pytest.mark.parametrize("bad_lines", ["error", "skip"])
def test_a_line_of_a_gibibyte_is_refused_in_bounded_memory(tmp_path, bad_lines):
    path = tmp_path / "c.jsonl"
    path.touch()
    os.truncate(path, 1 << 30)
    done = subprocess.run([sys.executable, "-c", HUGE_LINE, path, bad_lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a line of over 67108864 bytes" in done.stdout and f"{path}:1" in done.stdout


def test_a_corpus_edited_between_the_passes_is_refused_and_nothing_sealed(toy_request, monkeypatch):
    request = toy_request()
    reading = capture_module.Derivation.reading

    def edit_first(*args):
        with open(request.corpus[0], "ab") as file:
            file.write(b'{"text":"one more line"}\n')
        return reading(*args)

    monkeypatch.setattr(capture_module.Derivation, "reading", edit_first)
    with pytest.raises(CorpusError, match="changed while it was read"):
        capture_module.capture(request)
    assert not [line for line in list_stores(request.stores) if line.sealed]
    monkeypatch.undo()
    assert capture_module.capture(request)  # the command run again takes the corpus as it is now
