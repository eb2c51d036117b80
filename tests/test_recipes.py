"""The recipes' commands run, on miniatures in the place of large models and hub datasets."""

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
import torch
from helpers import ROOT, TINY, words, write_jsonl

from actstore.backends import load_backend
from actstore.backends._folder import TOKENIZER_FILES
from actstore.catalog import list_stores, open_store
from actstore.check import check_store

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


def test_the_overnight_recipe_runs_and_loads_half_the_model(home):
    script = "\n".join(re.findall(r"```bash\n(.*?)```", RECIPE, re.DOTALL))
    for text, stand_in in STAND_INS.items():
        assert text in script
        script = script.replace(text, stand_in)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", "set -euo pipefail\n" + script], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
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


# --- several workers on a shared folder -------------------------------------------------------------------------------

SHARED = {
    "/shared/stores": "stores", "/shared/models/Llama-3.1-8B": str(TINY), "/shared/corpus": "corpus.jsonl",
    "blocks.16.hook_resid_pre": "blocks.1.mlp.hook_post", "--seq-len 1024 --dtype bfloat16 --rows 200000000":
    "--seq-len 128 --batch-tokens 1024 --rows 49152", "sleep 5": "sleep 0.1",
}  # fmt: skip
GROUPS = 6  # of 8,192 rows


def script_of(name: str) -> str:
    """The only script of a recipe, with miniatures in the place of what is large."""
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "recipes" / name).read_text(), re.DOTALL)
    for text, stand_in in SHARED.items():
        assert text in script or text in ("sleep 5",)
        script = script.replace(text, stand_in)
    return script


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a corpus, and the content digest of an undisturbed capture."""
    home = tmp_path_factory.mktemp("shared")
    write_jsonl(home / "corpus.jsonl", words(1200, 60))
    (home / "alone").mkdir()
    (home / "alone" / "corpus.jsonl").symlink_to(home / "corpus.jsonl")
    (alone,) = start(home / "alone", script_of("slurm-array-capture.md"), [{}])
    out, err = alone.communicate(timeout=120)
    assert alone.returncode == 0 and "worker" not in err, err
    return home, open_store(out.strip(), home / "alone" / "stores").content_digest


def start(home: Path, script: str, environments: list[dict[str, str]]) -> list[subprocess.Popen[str]]:
    """Start a script once an environment, as a scheduler does: the script itself is the process that is signalled."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM_")}
    clean |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(["bash", "-c", script], cwd=home, env={**clean, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, start_new_session=True)
        for more in environments
    ]  # fmt: skip


def wait_for(home: Path, groups: int) -> None:
    """Wait until so many row groups are committed."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and sum(line.committed for line in list_stores(home / "stores")) < groups:
        time.sleep(0.02)


def check_shared(home: Path, said: list[str], content: str) -> None:
    """Each who lived to the end has printed the digest of the one store, which is whole and what it always is."""
    (line,) = list_stores(home / "stores")
    assert line.sealed and said and {one.strip() for one in said} == {line.digest}
    store = open_store(line.digest, home / "stores")
    assert store.content_digest == content and len(store.manifest.groups) == GROUPS
    assert not check_store(store.path, data=True).findings


def test_the_slurm_array_finishes_with_one_element_killed_and_one_out_of_time(shared):
    """A fake sbatch: the batch script once an element; SIGKILL to one, SIGUSR1 to another, which is submitted again."""
    home, content = shared
    script, many = script_of("slurm-array-capture.md"), {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0"}
    array = [{**many, "SLURM_ARRAY_TASK_ID": str(i), "SLURM_PROCID": "0", "SLURM_NTASKS": "1"} for i in range(3)]
    out_of_time, killed, last = start(home, script, array)
    wait_for(home, 1)
    os.kill(out_of_time.pid, signal.SIGUSR1)
    killed.kill()
    _, said = out_of_time.communicate(timeout=120)
    assert out_of_time.returncode == 0 and "worker 0 of 3 (by SLURM_ARRAY_TASK_ID)" in said
    assert "SIGUSR1" in said, said
    killed.communicate()
    (again,) = start(home, script, array[:1])
    outs = [process.communicate(timeout=120) for process in (last, again)]
    assert (last.returncode, again.returncode) == (0, 0), outs
    assert "worker 2 of 3 (by SLURM_ARRAY_TASK_ID)" in outs[0][1]
    check_shared(home, [out for out, _ in outs], content)


def test_spot_instances_finish_whatever_is_killed(shared, tmp_path):
    """The recipe's loop on three machines; their captures are killed without notice, a machine comes back late."""
    home, content = shared
    shutil.copy(home / "corpus.jsonl", tmp_path)
    machines = start(tmp_path, script_of("spot-instances.md"), [{"RANK": str(i)} for i in range(3)])
    wait_for(tmp_path, 1)
    os.killpg(machines[0].pid, signal.SIGKILL)  # the machine with its loop
    (capture,) = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
    os.kill(int(capture), signal.SIGKILL)  # its loop goes on
    machines += start(tmp_path, script_of("spot-instances.md"), [{"RANK": "0"}])
    ended = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines[1:]] == [0, 0, 0], ended
    assert ended[1][1].count("worker 1 of 4 (by RANK)") == 2 and "Killed" in ended[1][1]
    check_shared(tmp_path, [out for out, _ in ended[1:]], content)
