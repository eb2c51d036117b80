"""Promise 11: what can change the content is in the key; what cannot be hashed is an error; a clock decides nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import ROOT, TINY, write_jsonl

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import UsageError

# Each option of a capture, and what another value of it must do to the store digest.
CHANGES_THE_KEY = {
    "model": "toy:8", "hooks": ("hook_embed",), "text_field": "other", "bad_lines": "skip", "max_documents": 5, "seq_len": 33,
    "packing": "truncate", "bos": False, "rows": 100, "dtype": "float16", "center": True,
}  # fmt: skip
LEAVES_THE_KEY = {"batch_tokens": 64, "device": "cpu", "workers": 2, "rank": 1, "stores": None}
# Other tests: where the files are, test_content.py, test_transformers.py, test_reference_rows.py.
ELSEWHERE = {
    "token_field", "chat_template", "corpus", "dataset", "dataset_config", "dataset_revision", "split", "revision",
    "compute_dtype", "backend", "pad_together",
}  # fmt: skip


def test_every_option_is_known_to_change_the_key_or_not():
    """A new option fails here until somebody has decided."""
    assert {f.name for f in fields(CaptureRequest)} == CHANGES_THE_KEY.keys() | LEAVES_THE_KEY.keys() | ELSEWHERE


def test_what_changes_rows_changes_the_digest_and_nothing_else_does(toy_request, tmp_path):
    corpus = write_jsonl(tmp_path / "both.jsonl", ["some text " * 40] * 40)
    corpus.write_text(corpus.read_text().replace('{"text": "', '{"other": "more of the text here", "text": "'))
    base = toy_request(corpus=(corpus,))
    (digest,) = capture(base)
    changed = [capture(toy_request(corpus=(corpus,), **{name: value}))[0] for name, value in CHANGES_THE_KEY.items()]
    assert len({digest, *changed}) == 1 + len(CHANGES_THE_KEY)
    for name, value in LEAVES_THE_KEY.items():
        if name not in ("rank", "stores"):
            assert capture(toy_request(corpus=(corpus,), **{name: value})) == [digest], name


def test_one_byte_of_the_corpus_or_its_division_into_files_changes_the_digest(toy_request, tmp_path):
    text = [f"document number {i} with words" for i in range(40)]
    one = write_jsonl(tmp_path / "one.jsonl", text)
    other = write_jsonl(tmp_path / "other.jsonl", [*text[:-1], text[-1].replace("number", "numbor")])
    halves = (write_jsonl(tmp_path / "a.jsonl", text[:20]), write_jsonl(tmp_path / "b.jsonl", text[20:]))
    digests = [capture(toy_request(corpus=c))[0] for c in ((one,), (other,), halves, halves[::-1])]
    assert len(set(digests)) == 4
    renamed = one.rename(tmp_path / "renamed.jsonl")
    assert capture(toy_request(corpus=(renamed,))) == digests[:1]  # a path is no content


def test_changed_weights_config_or_tokenizer_change_the_digest(tmp_path, tiny_corpus):
    import shutil

    digests = []
    for name in ("", "model.safetensors", "config.json", "tokenizer.json"):
        folder = tmp_path / (name or "same")
        shutil.copytree(TINY, folder)
        if name == "model.safetensors":
            data = bytearray((folder / name).read_bytes())
            data[-1] ^= 1
            (folder / name).write_bytes(data)
        elif name:
            (folder / name).write_text((folder / name).read_text() + "\n")
        request = CaptureRequest(
            model=str(folder), hooks=("hook_embed",), corpus=(tiny_corpus,), rows=256, stores=tmp_path / "stores"
        )
        digests.append(capture(request)[0])
    assert len(set(digests)) == 4


def test_what_cannot_be_hashed_is_an_error(toy_request):
    with pytest.raises(UsageError, match="text_field"):
        capture(toy_request(text_field=""))
    with pytest.raises(UsageError):
        capture(toy_request(text_field="x" * 5000))


@pytest.mark.parametrize("jump", [1e9, -1e9, -1.5], ids=["forward", "back", "slowly back"])
def test_a_jumping_clock_changes_nothing(toy_request, tmp_path, monkeypatch, jump):
    """Fault 17: every look at the clock is `jump` seconds later than the one before."""
    expected = open_store(capture(toy_request())[0], toy_request().stores).content_digest
    now = itertools.count(1_800_000_000.0, jump)
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    request = toy_request(stores=tmp_path / "jumping")
    assert open_store(capture(request)[0], request.stores).content_digest == expected


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Adak"])
def test_another_time_zone_locale_or_hash_seed_changes_nothing(toy_request, tmp_path: Path, zone):
    request = toy_request()
    expected = capture(request)[0]
    command = [str(Path(sys.executable).parent / "actstore"), "capture", "--backend", "toy", "--model", "toy:16"]
    command += [
        "--hook",
        request.hooks[0],
        "--corpus",
        str(request.corpus[0]),
        "--seq-len",
        "32",
        "--stores",
        str(tmp_path / "z"),
    ]
    env = {**os.environ, "TZ": zone, "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr
    here, there = (open_store(expected, s).content_digest for s in (request.stores, tmp_path / "z"))
    assert here == there
