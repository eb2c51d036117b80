"""`actstore capture` and `plan` as a user meets them: rows 18 to 25 of the fault matrix, stops, plans, kinds of corpora."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner, Result
from helpers import TINY, words, write_jsonl

from actstore.catalog import list_stores

BIN = Path(sys.executable).parent
TOY = ("--backend", "toy", "--model", "toy:16", "--hook", "blocks.0.hook_resid_pre", "--seq-len", 32)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with a corpus."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", words(60))
    return tmp_path


def actstore(*args) -> Result:
    return CliRunner().invoke(actstore_main, [str(a) for a in args])


def capture(*more, corpus="corpus.jsonl") -> Result:
    return actstore("capture", *TOY, *(("--corpus", corpus) if corpus else ()), *more)


def refused(result: Result, code: int, *words_in_it: str) -> None:
    """One message, no traceback, nothing on stdout, nothing sealed."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert len(re.findall(r"^\w+: ", result.stderr, re.MULTILINE)) >= 1
    for text in words_in_it:
        assert text in result.stderr, result.stderr
    assert not [line for line in list_stores(Path("stores")) if line.sealed]


# --- the fault matrix, rows 18 to 25 ----------------------------------------------------------------------------------


def test_row_18_what_is_no_number_is_named_by_hook_point_and_row(home):
    write_jsonl(home / "nan.jsonl", ["fine " * 20, "x\x01y", "fine " * 20])
    refused(capture(corpus="nan.jsonl"), 3, "NonFiniteActivation: the model gave nan", "blocks.0.hook_resid_pre, row 1")


def test_row_19_a_value_beyond_float16_is_named_and_so_is_the_way_out(home):
    write_jsonl(home / "large.jsonl", ["fine " * 20, "x\x02y", "fine " * 20])
    refused(capture("--dtype", "float16", corpus="large.jsonl"), 3, "65520 is beyond the range of float16", "use --dtype float32")
    assert capture("--dtype", "float32", corpus="large.jsonl").exit_code == 0


def test_row_20_a_diverging_fit_ends_with_step_and_rate(home):
    digest = capture().stdout.strip()
    arguments = ["fit", "--store", digest, "--n-latents", "64", "--k", "4", "--lr", "1e38", "--batch-size", "64"]
    result = CliRunner().invoke(trainer_main, arguments)
    assert result.exit_code == 8 and "Traceback" not in result.stderr and "step" in result.stderr and "lr" in result.stderr


BAD_LINES = {
    "broken JSON": (b'{"text": broken}', "not valid JSON"),
    "no object": (b"[1]", "expected an object"),
    "no such field": (b'{"body":"x"}', "no field 'text'; the record has body"),
    "no text": (b'{"text":5}', "is int, not text"),
    "a chat": (b'{"text":[{"role":"user","content":"x"}]}', "--chat-template default"),
    "token ids": (b'{"text":[1,2]}', "--token-field text"),
    "bad UTF-8": (b'{"text":"\xff"}', "not UTF-8 at byte 10"),
    "a BOM": (b'\xef\xbb\xbf{"text":"x"}', "BOM"),
    "half a surrogate pair": (b'{"text":"\\ud800"}', "surrogate"),
    "a NUL": (b'{"text":"a\x00b"}', "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_row_21_a_bad_line_is_named_by_file_and_line_and_can_be_skipped(home, kind):
    line, reason = BAD_LINES[kind]
    (home / "bad.jsonl").write_bytes((home / "corpus.jsonl").read_bytes() + line + b"\n")
    refused(capture(corpus="bad.jsonl"), 3, "CorpusError: ", reason, "bad.jsonl:61", "--bad-lines skip")
    skipped = capture("--bad-lines", "skip", corpus="bad.jsonl")
    assert skipped.exit_code == 0 and "60 documents read (0 empty left out, 1 bad skipped)" in skipped.stderr


def test_row_21_line_ends_of_windows_and_none_at_the_end_are_fine(home):
    data = (home / "corpus.jsonl").read_bytes()
    (home / "windows.jsonl").write_bytes(data.replace(b"\n", b"\r\n").rstrip())
    rows = [json.loads(capture("--json", corpus=name).stdout)["rows"] for name in ("corpus.jsonl", "windows.jsonl")]
    assert rows[0] == rows[1]


def test_row_22_empty_documents_are_counted_and_an_empty_corpus_is_refused(home):
    write_jsonl(home / "empty.jsonl", ["", "  "])
    refused(capture(corpus="empty.jsonl"), 3, "the corpus gives 0 sequences")
    (home / "some.jsonl").write_bytes((home / "corpus.jsonl").read_bytes() + b'\n{"text":""}\n')
    assert "60 documents read (2 empty left out" in capture(corpus="some.jsonl").stderr


def test_row_23_a_line_without_end_is_refused(home):
    (home / "huge.jsonl").touch()
    os.truncate(home / "huge.jsonl", 70 << 20)
    refused(capture(corpus="huge.jsonl"), 3, "a line of over 67108864 bytes", "huge.jsonl:1")


@pytest.mark.parametrize("how", ["appended", "cut", "replaced"])
def test_row_24_a_corpus_that_changes_while_it_is_read_is_refused(home, how, monkeypatch):
    module = importlib.import_module("actstore.capture")
    reading = module.Derivation.reading

    def change_first(*args):
        path = home / "corpus.jsonl"
        if how == "appended":
            path.write_bytes(path.read_bytes() + b'{"text":"one more"}\n')
        elif how == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            write_jsonl(home / "other", words(60, seed=1)).rename(path)
        return reading(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module.Derivation, "reading", change_first)
        result = capture()
    assert result.exit_code == 3 and ("changed while it was read" in result.stderr or "not valid JSON" in result.stderr)
    assert not [line for line in list_stores(Path("stores")) if line.sealed]
    if how != "cut":
        assert capture().exit_code == 0


def test_row_25_a_repair_from_another_corpus_names_what_differs(home):
    digest = capture().stdout.strip()
    chunk = home / "stores" / digest / "tokens" / "c.0"
    os.chmod(chunk, 0o644)
    chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
    write_jsonl(home / "other.jsonl", words(60, seed=1))
    result = actstore("repair", digest, "--model", "toy:16", "--corpus", "other.jsonl")
    assert result.exit_code == 3 and "KeyMismatch" in result.stderr and "corpus: the store has" in result.stderr
    assert actstore("repair", digest, "--model", "toy:16", "--corpus", "corpus.jsonl").exit_code == 0


def test_row_25_a_token_id_beyond_the_vocabulary_is_named(home):
    (home / "ids.jsonl").write_text('{"ids":[1,2,3]}\n{"ids":[4,257]}\n')
    result = capture("--token-field", "ids", corpus="ids.jsonl")
    refused(result, 3, "token id 257, the model's vocabulary has 257", "ids.jsonl:2")


# --- kinds of corpora -------------------------------------------------------------------------------------------------


def test_a_local_folder_may_be_named_as_dataset_with_its_split(home):
    import datasets

    texts = words(60)
    saved = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict(train=saved, test=saved.select(range(3))).save_to_disk(home / "saved")
    rows = json.loads(capture("--json").stdout)["rows"]
    assert json.loads(capture("--dataset", "saved", "--json", corpus=None).stdout)["rows"] == rows
    assert json.loads(capture("--dataset", "saved", "--split", "test", "--json", corpus=None).stdout)["rows"] < rows / 10


def test_chats_through_the_command_line(home):
    chat = [{"role": "user", "content": "Hi " * 20}, {"role": "assistant", "content": "Hello " * 20}]
    (home / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": "none"}) + "\n")
    options = ("--text-field", "messages", "--chat-template", "default")
    refused(capture(*options, corpus="chats.jsonl"), 3, "is no chat", "chats.jsonl:2")
    done = capture(*options, "--bad-lines", "skip", "--json", corpus="chats.jsonl")
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"] >= 160


# --- plans and stops --------------------------------------------------------------------------------------------------


def test_a_plan_in_words_and_as_json_and_its_command_captures_what_it_said(home, monkeypatch):
    command = ["plan", *TOY, "--corpus", "corpus.jsonl", "--budget", "300KB"]
    monkeypatch.setattr(sys, "argv", ["actstore", *map(str, command)])
    refused(actstore(*command), 2, "no budget", "kB")
    command[-1] = "300kB"
    monkeypatch.setattr(sys, "argv", ["actstore", *map(str, command)])
    shown = actstore(*command)
    assert shown.exit_code == 0 and "in each dtype" in shown.stdout, shown.stderr
    assert not (home / "stores").exists()
    monkeypatch.setattr(sys, "argv", ["actstore", *map(str, command), "--json"])
    plan = json.loads(actstore(*command, "--json").stdout)
    assert plan["rows"] == 2048 and plan["needed_bytes"] <= 300_000 < 2 * plan["needed_bytes"]
    line = shown.stdout.splitlines()[-1].split()
    assert line == plan["command"].split() and line[:2] == ["actstore", "capture"] and line[-2:] == ["--rows", str(plan["rows"])]
    assert "--budget" not in line and "--json" not in line
    assert json.loads(actstore(*line[1:], "--json").stdout)["rows"] == plan["rows"]


def test_a_plan_that_does_not_fit_is_shown_and_refused(home):
    result = actstore("plan", *TOY, "--corpus", "corpus.jsonl", "--rows", 10**11)
    assert result.exit_code == 6 and "DiskFull" in result.stderr and "100,000,000,000" in result.stdout


def test_until_a_time_in_the_past_or_none_is_refused(home):
    refused(capture("--until", "2020-01-01T08:00"), 2, "in the past")
    refused(capture("--until", "noon"), 2, "not a time", "08:00")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_signals_finish_the_row_groups_in_hand_and_say_how_to_go_on(home, number, code):
    """The installed command and the embedded model, on a corpus of some seconds; then the line it printed is run."""
    write_jsonl(home / "long.jsonl", words(700, 60))
    command = ["actstore", "capture", "--model", str(TINY), "--hook", "blocks.1.mlp.hook_post", "--corpus", "long.jsonl",
               "--batch-tokens", "1024", "--rows", "40960", "--json"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [BIN / command[0], *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 60
    while not list(home.glob("stores/.staging/*/row_groups/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    said = json.loads(out)
    assert not said["sealed"] and said["stopped"] == number.name and 0 < said["rows_committed"] < said["rows"]
    (line,) = list_stores(home / "stores")
    assert line.committed * 8192 == said["rows_committed"] and f"{number.name}: the row groups in hand" in err
    if number == signal.SIGUSR1:
        return
    use = err[err.index("to use what is there") :].splitlines()[1].strip()
    done = subprocess.run(["bash", "-c", use], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == said["rows_committed"], done.stderr
    assert json.loads(done.stdout)["needed_bytes"] == 0
    again = err.strip().splitlines()[-1].strip()
    assert again.startswith("actstore capture")
    done = subprocess.run(["bash", "-c", again], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["sealed"], done.stderr
