"""The recipes' commands run, on miniatures in the place of large models and hub datasets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT, TINY, words, write_jsonl

from actstore.backends import load_backend
from actstore.backends._folder import TOKENIZER_FILES
from actstore.catalog import open_store
from actstore.check import check_store
from trainer.config import FitConfig, resolve
from trainer.memory import member_bytes
from trainer.sae import Widths

SCALE = (ROOT / "recipes" / "sae-at-scale.md").read_text()
RECIPE = (ROOT / "recipes" / "llama-3.1-8b-overnight.md").read_text()
# What is Llama-3.1-8B's own: RoPE scaling, 32 layers, 4 heads to a key/value head, an MLP of 3.5 times the width, bfloat16.
MINIATURE = {
    "num_hidden_layers": 32, "hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
STAND_INS = {
    "meta-llama/Llama-3.1-8B": "model",
    "--dataset HuggingFaceFW/fineweb --dataset-config sample-10BT": "--corpus corpus.jsonl",
    "--budget 2TB": "--budget 3MB", "--budget 9h": "--budget 1m", "--rows 200000000": "--rows 2048",
    "--until 08:00": "--until 2099-01-01T08:00",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    import transformers

    home = tmp_path_factory.mktemp("overnight")
    vocabulary = load_backend("auto", str(TINY), None, "auto", "cpu").vocabulary_size
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=vocabulary, **MINIATURE)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(home / "model")
    for name in TOKENIZER_FILES:
        if (TINY / name).is_file():
            shutil.copy(TINY / name, home / "model")
    write_jsonl(home / "corpus.jsonl", words(1000, 60))
    return home


def run_blocks(recipe: str, stand_ins: dict[str, str], home: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run all of a recipe's shell commands, with what stands for models and data sets that are out of reach."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", recipe, re.DOTALL))
    for text, stand_in in stand_ins.items():
        assert text in script
        script = script.replace(text, stand_in)
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + script], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def test_the_overnight_recipe_runs_and_loads_half_the_model(home, warm_path):
    done = run_blocks(RECIPE, STAND_INS, home, warm_path)
    assert "already captured" in done.stderr and done.stdout.count("to capture it:\n  actstore capture --model model") == 2
    (folder,) = (home / "stores").glob("?" * 64)
    store = open_store(folder)
    assert (store.rows, store.d_model, store.dtype, store.key.attention) == (2048, 64, "bfloat16", "sdpa")
    assert not check_store(folder, data=True).findings
    backend = load_backend("auto", str(home / "model"), None, "auto", "cpu")
    config = json.loads((home / "model" / "config.json").read_text())
    layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 224 + 2 * 64
    assert backend.weight_bytes(["blocks.16.hook_resid_pre"]) == 2 * (16 * layer + config["vocab_size"] * 64 + 64)


def test_the_recipes_arithmetic():
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert round(layer / 1e6) == 218 and "218 M" in RECIPE
    assert f"{2 * (16 * layer + 128256 * 4096) / 1e9:.1f} GB" == "8.0 GB" and "8.0 GB" in RECIPE
    flop = 2 * 16 * layer + 16 * 2 * 2 * 4096 * 512
    for rate, row in ((82e12, "11,500 | 330 M | 2.7 TB"), (490e12, "69,000 | 2.0 G | 16 TB"), (7e12, "980 | 28 M | 230 GB")):
        tokens = rate / flop
        shown, rows, size = (text.strip() for text in row.split("|"))
        unit = {"M": 1e6, "G": 1e9}
        of = {"TB": 1e12, "GB": 1e9}
        assert row in RECIPE and tokens == pytest.approx(float(shown.replace(",", "")), rel=0.03)
        assert tokens * 28800 == pytest.approx(float(rows.split()[0]) * unit[rows.split()[1]], rel=0.03)
        assert tokens * 28800 * 8204 == pytest.approx(float(size.split()[0]) * of[size.split()[1]], rel=0.05)


def test_the_study_at_scale_runs_from_capture_to_plot(tmp_path, warm_path):
    write_jsonl(tmp_path / "corpus.jsonl", words(150, 70))
    (tmp_path / "gpt2-medium").symlink_to(TINY)
    done = run_blocks(
        SCALE,
        {
            "--dataset NeelNanda/pile-10k": "--corpus corpus.jsonl", "blocks.12.": "blocks.2.", "--rows 2600000": "--rows 6000",
            "--rows 8125,81250,2437500 --study-rows 8125,81250": "--rows 300,2000 --study-rows 300 --n-latents 64 --k 4",
            "benchmarks/": f"{ROOT}/benchmarks/", "--store $study": "--store $study --n-latents 64 --k 4",
        },
        tmp_path, warm_path,
    )  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [(r["recipe"], r["rows"], r["seed"]) for r in results] == [
        *(("actstore topk", rows, seed) for rows in (300, 2000) for seed in (42, 43)),
        *((recipe, 300, seed) for recipe in ("reference study", "study, centred") for seed in (42, 43)),
    ]  # fmt: skip
    assert all(0 < r["fvu"] < 3 and 0 <= r["dead"] < 1 and 0 <= r["contexts"] <= 1 and 0 <= r["coherent"] <= 1 for r in results)
    assert results[2]["fvu"] < results[0]["fvu"] and "| reference study | 300 | 2 |" in done.stdout
    picture = ElementTree.parse(tmp_path / "sae-at-scale.svg").getroot()
    assert len(picture.findall("{*}circle")) == 3 * len(results) and "median coherence" in done.stderr


def test_the_scale_recipe_shows_the_numbers_of_its_table():
    """The picture and the table in the recipe come from one file of results."""
    lines = re.findall(
        r"^\| (actstore topk|reference study|study, centred) \| ([\d,]+) \| \d \| [\d.]+ \| [\d.]+ \| [\d.]+% ",
        SCALE,
        re.MULTILINE,
    )
    picture = (ROOT / "recipes" / "sae-at-scale.svg").read_text()
    assert len(lines) >= 5
    for name, rows in lines:
        thousands = int(rows.replace(",", "")) / 1000
        assert name in picture and (thousands > 999 or f">{thousands:.{1 if thousands < 10 else 0}f}k</text>" in picture)


def test_the_recipe_for_eight_gpus_runs_on_two_processes(toy_session_store, tmp_path):
    text = (ROOT / "recipes" / "torchrun-8-gpus.md").read_text()
    script = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    for written, stand_in in (
        ("torchrun --nproc-per-node 8", f"{sys.executable} -m torch.distributed.run --nproc-per-node 2"),
        ("16384,32768", "32,64"), ("32,64 --seed 1,2", "4,8 --seed 1,2 --rows 1000 --batch-size 128"), ("1048576", "64"),
        ("--k 64 --parallel", "--k 4 --rows 1000 --batch-size 128 --parallel"),
    ):  # fmt: skip
        assert written in script
        script = script.replace(written, stand_in)
    folder = {"ACTSTORE_STORES": str(toy_session_store.path.parent), "ACTSTORE_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **folder, "store": toy_session_store.digest}
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + script],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    digests = done.stdout.split()
    assert len(digests) == len(set(digests)) == 9 and {p.name for p in tmp_path.glob("?" * 64)} == set(digests)
    assert all((tmp_path / digest / "result.json").exists() for digest in digests)


def test_the_eight_gpu_recipes_arithmetic():
    text = (ROOT / "recipes" / "torchrun-8-gpus.md").read_text()
    (config,) = resolve(FitConfig(n_latents=(1 << 20,)), 4096, 10**9)
    whole = member_bytes(config, Widths((4096,)))
    assert f"{whole / 1e9:.0f} GB" == "137 GB" and "137 GB" in text and f"{whole / 8e9:.0f} GB on each" in text


def test_two_labs_share_a_store_through_a_bucket(proxy, tmp_path, warm_path):
    text = (ROOT / "recipes" / "bucket-sharing.md").read_text()
    script = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    stand_ins = {
        "--model meta-llama/Llama-3.1-8B --hook blocks.16": "--backend toy --model toy:16 --seq-len 32 --hook blocks.0",
        "s3://our-bucket/activations": proxy.place,
    }
    for part, stand_in in stand_ins.items():
        assert part in script
        script = script.replace(part, stand_in)
    write_jsonl(tmp_path / "corpus.jsonl", words(60))
    for lab in ("lab-a", "lab-b"):
        (tmp_path / lab).mkdir()
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + script],
        cwd=tmp_path,
        env={**os.environ, "PATH": warm_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "sealed  " in done.stdout and "whole in s3://" in done.stderr
    a, b = (open_store(next((tmp_path / lab / "stores").glob("?" * 64))) for lab in ("lab-a", "lab-b"))
    assert a.content_digest == b.content_digest and not check_store(b.path, data=True).findings
    assert len(list((tmp_path / "lab-b" / "runs").glob("?" * 64))) == 2  # another order of rows, another run
    assert list((tmp_path / "lab-b" / "scratch").rglob("c.0.0"))
