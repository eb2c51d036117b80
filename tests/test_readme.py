"""Every command and every Python line of README.md runs, on the embedded model instead of gpt2-medium and the Pile."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, TINY, words, write_jsonl

import actstore

README = (ROOT / "README.md").read_text()
# What stands for what: the hub is out of reach in tests, and the model has four layers.
STAND_INS = {
    "--dataset NeelNanda/pile-10k": "--corpus my.jsonl",
    "blocks.12.": "blocks.2.",
    "--rows 1000000": "--rows 4000",
    "--n-latents 2048": "--n-latents 256",
    "n_latents=2048": "n_latents=256",
    "--until 08:00": "--until 2099-01-01T08:00",
    "--budget 8h": "--budget 20m",
}


def blocks(language: str) -> str:
    found = "\n".join(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL))
    for text, stand_in in STAND_INS.items():
        found = found.replace(text, stand_in)
    return found


@pytest.fixture(scope="module")
def toured(tmp_path_factory, warm_path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    home = tmp_path_factory.mktemp("tour")
    (home / "gpt2-medium").symlink_to(TINY)
    write_jsonl(home / "my.jsonl", words(200, 60))
    environment = {**os.environ, "PATH": warm_path, "HF_HUB_OFFLINE": "1"}
    script = "set -euxo pipefail\n" + blocks("bash")
    return home, subprocess.run(["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True, check=False)


def test_every_shell_command_runs(toured):
    home, result = toured
    assert result.returncode == 0, result.stderr
    assert (home / "report.html").exists() and {p.name for p in (home / "sae").iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
    }
    assert len(list((home / "runs").glob("?" * 64))) == 3


def test_the_python_lines_run(toured, monkeypatch):
    home, _ = toured
    monkeypatch.chdir(home)
    stores = [actstore.open_store(path) for path in (home / "stores").glob("?" * 64)]
    scope = {"digest": max(stores, key=len).digest}  # the one that `store=` names
    exec(compile(blocks("python"), "README.md", "exec"), scope)
    assert scope["x_hat"].shape == (64, 192) and len(scope["runs"]) == 2


def test_every_listed_command_of_make_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
