"""The command line as a user meets it: what goes to stdout, exit codes, and one-message errors with nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from actstore_cli import output
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from helpers import TINY, cannot, words, write_jsonl

from trainer.checkpoint import find_run

BIN = Path(sys.executable).parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder with a corpus."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", words(30))
    return tmp_path


def run(main, *args):
    return CliRunner().invoke(main, [str(a) for a in args])


def actstore(*args):
    return run(actstore_main, *args)


def trainer(*args):
    return run(trainer_main, *args)


TOY = ("--backend", "toy", "--model", "toy:16", "--hook", "blocks.0.hook_resid_pre", "--corpus", "corpus.jsonl", "--seq-len", 32)


def captured(*more):
    result = actstore("capture", *TOY, *more)
    assert result.exit_code == 0, result.stderr
    return result.stdout.split()


def test_the_whole_path(home):
    (digest,) = captured()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert captured() == [digest]  # free the second time
    fitted = trainer("fit", "--store", digest[:8], "--n-features", 64, "--k", "2,4", "--batch-size", 128)
    assert fitted.exit_code == 0, fitted.stderr
    runs = fitted.stdout.split()
    assert len(runs) == 2 and all((home / "runs" / r / "sae.safetensors").exists() for r in runs)
    again = trainer("fit", "--store", digest[:8], "--n-latents", 64, "--k", "2,4", "--batch-size", 128)
    assert again.stdout.split() == runs and "nothing to do" in again.stderr
    report = trainer("report", *runs, "--rows", 500)
    assert report.exit_code == 0 and Path(report.stdout.strip()).exists()
    shown = trainer("features", runs[0], "--latent", 3)
    assert shown.exit_code == 0 and "latent 3" in shown.stdout and "--model" in shown.stderr and "features:" not in shown.stderr
    assert trainer("features", runs[0], "--latent", 64).exit_code == 2 and "latent" in trainer("features", runs[0]).stdout
    exported = trainer("export", runs[0], "--format", "saelens", "--out", "out")
    assert sorted(Path(p).name for p in exported.stdout.split()) == ["cfg.json", "sae_weights.safetensors"]
    assert "finished" in trainer("ls").stdout and "sealed" in actstore("ls").stdout
    evaluated = trainer("evaluate", runs[0]).stdout
    assert re.search(r"explained_variance +0\.\d+ +0\.\d+", evaluated) and "dead_window_rows" in evaluated
    compared = trainer("compare", *runs)
    assert compared.exit_code == 0 and "PW-MCC" in compared.stdout and runs[1][:12] in compared.stdout, compared.stderr
    assert "PW-MCC" not in trainer("compare", *runs, "--no-pairs").stdout
    (kept,) = (home / "runs" / runs[0] / "evaluations").iterdir()
    kept.write_text("{}")
    listed = trainer("ls")
    assert listed.exit_code == 0 and "damaged" in listed.stderr and runs[0][:12] not in listed.stdout
    assert runs[1][:12] in listed.stdout and trainer("evaluate", runs[0]).exit_code == 7
    kept.unlink()
    assert "config.k" in trainer("info", runs[0]).stdout and "rows_per_group" in actstore("info", digest).stdout
    assert actstore("verify", digest, "--data").exit_code == 0
    assert "blocks" not in actstore("head", digest, "-n", 3).stdout
    assert actstore("rm", digest).exit_code == 0 and not (home / "stores" / digest).exists()
    assert trainer("evaluate", runs[0]).exit_code == 5


def test_a_run_is_removed_in_whatever_state_it_is_but_not_from_under_a_fit(home):
    (digest,) = captured()
    sweep = ("--store", digest, "--n-latents", 32, "--k", "2,3,4", "--rows", 500)
    whole, damaged, held = trainer("fit", *sweep).stdout.split()
    (home / "runs" / damaged / "config.json").write_text("{")
    with find_run(held, home / "runs").lock("a fit"):
        refused = trainer("rm", held)
        assert refused.exit_code == 4 and "held by a fit" in refused.stderr
    assert json.loads(trainer("rm", whole[:8], "--json").stdout) == {"removed": whole}
    assert trainer("rm", damaged, "--yes").exit_code == 0
    assert trainer("ls").stdout.count(held[:12]) == 1 and trainer("rm", whole).exit_code == 5
    assert not [p for p in (home / "runs").rglob("*") if p.name in (whole, damaged)]
    assert trainer("fit", *sweep).stdout.split() == [whole, damaged, held]  # nothing is in the way of making them again


def test_json_prints_exactly_one_object_with_the_promised_fields(home):
    (digest,) = captured()
    (run_digest,) = trainer("fit", "--store", digest, "--n-latents", 32, "--k", 2, "--rows", 500).stdout.split()
    outputs = {
        "capture": actstore("capture", *TOY, "--json"), "ls": actstore("ls", "--json"),
        "info": actstore("info", digest, "--json"), "verify": actstore("verify", digest, "--json"),
        "head": actstore("head", digest, "--json"),
        "fit": trainer("fit", "--store", digest, "--n-latents", 32, "--k", 2, "--rows", 500, "--json"),
        "runs": trainer("ls", "--json"), "run": trainer("info", run_digest, "--json"),
        "evaluate": trainer("evaluate", run_digest, "--json"), "compare": trainer("compare", run_digest, "--json"),
        "report": trainer("report", run_digest, "--json"),
        "features": trainer("features", run_digest, "--latent", 3, "--json"),
        "searched": trainer("features", run_digest, "--search", "a", "--json"),
        "export": trainer("export", run_digest, "--format", "saelens", "--out", "o", "--json"),
    }  # fmt: skip
    values = {name: json.loads(result.stdout) for name, result in outputs.items()}
    assert all(isinstance(v, dict) and len(outputs[n].stdout.splitlines()) == 1 for n, v in values.items())
    info = {"digest", "content_digest", "rows", "d_model", "dtype", "hook", "sealed", "bytes", "key", "statistics"}
    assert info <= set(values["info"])
    assert {"digest", "store", "arch", "n_latents", "k", "seed", "rows_seen", "metrics"} <= set(values["run"])
    wanted = {"explained_variance", "explained_variance_no_special", "mse_per_token", "l0", "dead_fraction", "rows"}
    assert wanted <= set(values["evaluate"])
    manifest = json.loads((home / "stores" / digest / "manifest.json").read_text())
    assert manifest["rows"] == values["info"]["rows"] == len(range(values["info"]["rows"]))


def test_a_config_file_and_options_that_win_over_it(home):
    (digest,) = captured()
    Path("fleet.toml").write_text("n_latents = [16, 32]\nk = 2\nrows = 300\nbatch_size = 64\n")
    fitted = trainer("fit", "--store", digest, "--config", "fleet.toml", "--k", 4)
    configs = [json.loads((home / "runs" / d / "config.json").read_text())["config"] for d in fitted.stdout.split()]
    assert [(c["n_latents"], c["k"], c["rows"]) for c in configs] == [(16, 4, 300), (32, 4, 300)]


def test_dry_run_writes_nothing(home):
    result = actstore("capture", *TOY, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["dry_run"] and plan["rows"] > 0 and plan["needed_bytes"] > 0 and not (home / "stores").exists()


@pytest.mark.parametrize(
    "change, code, words_in_it",
    [
        (["--model", "./no-such-folder", "--backend", "transformer_lens"], 2, "does not exist"),
        (["--model", "gpt2-medium", "--backend", "transformer_lens"], 2, "local folder"),
        (["--hook", "blocks.0.hook_resid_per"], 2, "nearest: blocks.0.hook_resid_pre"),
        (["--corpus", "no.jsonl"], 2, "does not exist"),
        (["--text-field", "body"], 3, "corpus.jsonl:1"),
        (["--corpus", "broken.jsonl"], 3, "broken.jsonl:2"),
        (["--corpus", "empty.jsonl"], 3, "0 sequences"),
        (["--rows", "100000000"], 3, "rows"),
        (["--seq-len", "1"], 2, "--seq-len"),
        (["--text-field", ""], 2, "text_field"),
        (["--hook", ""], 2, "hook"),
        (["--dataset", "NeelNanda/pile-10k"], 2, "--corpus"),
        (["--backend", "nope"], 2, "toy"),
    ],
)
def test_bad_input_to_capture(home, change, code, words_in_it):
    (digest,) = captured()
    Path("broken.jsonl").write_text('{"text":"fine"}\n{"text": broken}\n')
    Path("empty.jsonl").write_text("")
    base = {
        "--backend": "toy",
        "--model": "toy:16",
        "--hook": "blocks.0.hook_resid_pre",
        "--corpus": "corpus.jsonl",
        "--seq-len": "32",
    }
    if change[0] == "--dataset":
        base.pop("--corpus")
    result = actstore("capture", *[a for pair in {**base, change[0]: change[1]}.items() for a in pair], *change[2:])
    assert result.exit_code == code, result.stderr
    assert words_in_it in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
    assert actstore("verify", digest, "--data").exit_code == 0


@pytest.mark.parametrize(
    "args, code, words_in_it",
    [
        (["fit", "--store", "{store}", "--k", "64", "--n-latents", "32"], 2, "at most n_latents"),
        (["fit", "--store", "{store}", "--k", "x"], 2, "comma list"),
        (["fit", "--store", "{store}", "--arch", "nope"], 2, "topk"),
        (["fit", "--store", "{store}", "--config", "no.toml"], 2, "does not exist"),
        (["fit", "--store", "{store}", "--max-memory", "8 h"], 2, "no number of bytes"),
        (["fit", "--store", "{store}", "--max-memory", "1kB"], 2, "--max-memory"),
        (["fit", "--store", "0123456789"], 5, "no store begins"),
        (["fit", "--store", "../stores"], 5, "no such store folder"),
        (["fit", "--store", "XYZ"], 2, "not a digest"),
        (["info", "0123456789"], 5, "no run begins"),
        (["evaluate", "{run}", "--store", "{wide}"], 2, "width"),
        (["evaluate", "{run}", "--model-loss"], 2, "toy"),
        (["evaluate", "{run}", "--model", "no-folder"], 2, "does not exist"),
        (["compare", "{run}", "{run}"], 2, "twice"),
        (["compare", "{run}", "0123456789"], 5, "no run begins"),
        (["export", "{run}", "--format", "nope", "--out", "o"], 2, "saelens"),
        (["report"], 2, "RUN"),
        (["fit", "--store", "{store}", "--lr", "1e38", "--n-latents", "32", "--k", "2", "--batch-size", "32"], 8, "--lr"),
    ],
)
def test_bad_input_to_the_trainer(home, args, code, words_in_it):
    (store,) = captured()
    (wide,) = captured("--model", "toy:8")
    (run_digest,) = trainer("fit", "--store", store, "--n-latents", 32, "--k", 2, "--rows", 300).stdout.split()
    result = trainer(*[a.format(store=store, wide=wide, run=run_digest) for a in args])
    assert result.exit_code == code, result.stderr
    assert words_in_it in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
    assert actstore("verify", store, "--data").exit_code == 0 and trainer("info", run_digest).exit_code == 0


def test_an_ambiguous_hash_lists_the_candidates(home):
    (store,) = captured()
    twin = store[:6] + "0" * 58
    shutil.copytree(home / "stores" / store, home / "stores" / twin)
    result = actstore("info", store[:6])
    assert result.exit_code == 2 and store[:14] in result.stderr and twin[:14] in result.stderr


def test_damage_exits_1_and_a_foreign_version_7(home):
    (store,) = captured()
    chunk = home / "stores" / store / "acts" / "c.0.0"
    chunk.chmod(0o644)
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    result = actstore("verify", store, "--data", "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)["ok"]
    assert trainer("fit", "--store", store, "--n-latents", 8, "--k", 1).exit_code == 1
    manifest = home / "stores" / store / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes().replace(b'"format":1', b'"format":9'))
    result = actstore("info", store)
    assert result.exit_code == 7 and "version 9" in result.stderr and "version 1" in result.stderr


def test_no_disk_space_is_found_before_the_start_and_nothing_is_lost(home):
    full = home / "small"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", full], capture_output=True, check=False)
    if mounted.returncode:
        cannot("a tmpfs cannot be mounted here")
    try:
        result = actstore("capture", *TOY, "--stores", full)
        assert result.exit_code == 6 and "free" in result.stderr and result.stdout == ""
    finally:
        subprocess.run(["umount", full], check=True)


def start(*args):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([BIN / args[0], *map(str, args[1:])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_ctrl_c_on_the_real_command_resumes_to_the_same_store(home, tiny_corpus):
    """The installed console script, the embedded model, a real signal; SIGTERM is in test_capturing.py."""
    command = ["actstore", "capture", "--model", TINY, "--hook", "blocks.1.hook_resid_pre", "--corpus", tiny_corpus,
               "--seq-len", 64, "--batch-tokens", 512, "--rows", 10_000]  # fmt: skip
    process = start(*command, "--stores", "interrupted")
    deadline = time.monotonic() + 60
    while not list(Path("interrupted/.locks").glob("*.claims/0.lock")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"run the same command again" in err and out == b"" and b"Traceback" not in err
    digests = []
    for stores in ("interrupted", "straight"):
        process = start(*command, "--stores", stores)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        digests.append(json.loads(actstore("info", out.decode().strip(), "--stores", stores, "--json").stdout)["content_digest"])
    assert len(set(digests)) == 1


def test_help_names_units_and_defaults_and_imports_no_torch():
    for main, commands in (
        (actstore_main, ("capture", "ls", "info", "verify", "head", "rm")),
        (trainer_main, ("fit", "report", "export", "evaluate", "compare")),
    ):
        for name in commands:
            assert run(main, name, "--help").exit_code == 0
    code = "import sys, actstore_cli.actstore, actstore_cli.trainer; assert not {'torch', 'zarr', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "compdef" in actstore("completion", "zsh").stdout


def test_a_fleet_is_trained_in_passes_and_in_another_precision(home):
    (digest,) = captured()
    common = ["fit", "--store", digest, "--n-latents", 64, "--rows", 600, "--batch-size", 128]
    fleet = trainer(*common, "--k", "1,2,3", "--max-memory", "100kB")
    assert fleet.exit_code == 0 and "pass 2 of 2: not all fit into memory" in fleet.stderr, fleet.stderr
    assert "cpu kernel" in fleet.stderr
    low = trainer(*common, "--k", 2, "--precision", "bfloat16")
    assert low.exit_code == 0 and "bfloat16 kernel" in low.stderr and low.stdout not in fleet.stdout
    exact = trainer(*common, "--k", 2, "--precision", "auto")
    assert exact.stdout in fleet.stdout and "already trained" in exact.stderr


def test_text_of_others_commands_no_terminal(capfd):
    """Names in a stranger's store, and what is typed, reach the screen through these three."""
    hostile = "gpt2\x1b]0;owned\x07\x1b[2J\x9b2J\u202e"
    output.note(hostile)
    output.line(hostile)
    output.print_table(["model"], [[hostile]])
    printed = "".join(capfd.readouterr())
    assert printed.count("gpt2") == 3 and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed)


def test_another_distribution_with_a_package_trainer_is_refused_by_name(tmp_path):
    info = tmp_path / "coqui_trainer-0.0.36.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coqui-trainer\nVersion: 0.0.36\n")
    (info / "top_level.txt").write_text("trainer\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([BIN / "trainer", "ls"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "pip uninstall coqui-trainer" in result.stderr and "Traceback" not in result.stderr


def test_info_shows_norms_outliers_and_the_size_against_float32(home):
    (digest,) = captured()
    (small,) = captured("--dtype", "int8")
    plain, int8 = (json.loads(actstore("info", d, "--json").stdout) for d in (digest, small))
    assert plain["bytes"] == plain["bytes_float32"] == int8["bytes_float32"] and plain["smaller"] == 1
    assert int8["bytes"] == pytest.approx(int8["bytes_float32"] / int8["smaller"]) and int8["smaller"] > 2
    assert int8["exact_rows"] >= 0 and "exact_rows" not in plain and int8["dtype"] == "int8"
    for info in (plain, int8):
        norms = [info["statistics"][f"norm_{name}"] for name in ("min", "p01", "p50", "p99", "max")]
        assert norms == sorted(norms) and norms[0] > 0 and info["statistics"]["non_finite"] == 0
        assert info["statistics"]["outlier_severity"] > 1 and info["statistics"]["massive_rows"] == 0
    text = actstore("info", small).stdout
    for name in ("norm_p50", "outlier_severity", "massive_norm_share", "bytes_float32", "smaller", "exact_rows"):
        assert re.search(rf"^{name} +\S", text, re.M), name
    assert "not recorded" not in text


def test_info_of_a_store_without_norms_says_so(home, monkeypatch):
    from actstore import stats

    monkeypatch.setattr(stats, "norm_bins", lambda norms: None)
    (digest,) = captured()
    assert re.search(r"^norm_p50 +not recorded$", actstore("info", digest).stdout, re.M)
    assert json.loads(actstore("info", digest, "--json").stdout)["statistics"]["norm_max"] is None
