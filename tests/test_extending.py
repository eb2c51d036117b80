"""docs/extending.md: its three files, each put in its place in a copy of the repository, and nothing else changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

FILES = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', (ROOT / "docs" / "extending.md").read_text(), re.DOTALL))
COPIED = ("actstore", "trainer", "cli", "tests", "docs", "data/tiny-gpt2", "pyproject.toml")
CONTRACT = ("tests/test_structure.py", "tests/trainer/test_architectures.py", "tests/trainer/test_outputs.py",
            "tests/actstore/test_backends.py", "tests/test_use.py")  # fmt: skip
ATOMS = "tests/trainer/test_architectures.py::test_known_atoms_are_found_and_three_times_the_default_rate_stays_finite"
LEFT_OUT = ("--deselect", ATOMS)  # 2,000 steps take longer than all the rest; the example passes them too
# Written beside the copied tests: all three files at once, as a user has them.
USE = """
import numpy as np
import torch
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from helpers import TINY, words, write_jsonl

import trainer
from actstore import CaptureRequest, capture, open_store
from actstore.backends import load_backend
from trainer.formats import export_run


def test_embedding_floored_topk_and_gemma_scope(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", words(30, 40))
    request = CaptureRequest(
        model=str(TINY), hooks=("hook_embed",), corpus=(corpus,), seq_len=64, backend="embedding", stores=tmp_path / "s"
    )
    store = open_store(capture(request)[0], tmp_path / "s")
    assert store.key.backend == "embedding"
    tokens = store.read("tokens", 0, 64).astype(np.int64)[None]
    fast = load_backend("transformers", str(TINY), None, "auto", "cpu")
    assert np.array_equal(store[:64], fast.launch(tokens, [64], ["hook_embed"], ["float32"])()[0])

    command = ["capture", "--backend", "embedding", "--model", str(TINY), "--hook", "hook_embed", "--seq-len", "64",
              "--corpus", str(corpus), "--stores", str(tmp_path / "s")]
    assert CliRunner().invoke(actstore_main, command).stdout.split() == [store.digest]  # captured already
    assert "floored_topk" in CliRunner().invoke(trainer_main, ["archs"]).stdout

    runs, archs = tmp_path / "runs", ("floored_topk", "jumprelu")
    config = trainer.FitConfig(arch=archs, n_latents=(64,), k=(4,), batch_size=128, epochs=2, option={"floor": 0.3})
    results = trainer.fit(store, config, runs)
    for result in results:
        lines = trainer.load_run(result.digest, runs).metrics
        assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"], lines
    ours, theirs = (trainer.find_run(r.digest, runs) for r in results)
    assert ours.config.options == (("floor", 0.3),)
    x = torch.tensor(store[:100])
    codes = trainer.load_sae(ours.digest, runs).encode(x)
    assert (codes > 0).sum(1).max() <= 4 and ((codes == 0) | (codes >= 0.3 * codes.amax(1, keepdim=True))).all()

    export_run(theirs, "gemma_scope", tmp_path / "out")
    p, sae = np.load(tmp_path / "out" / "params.npz"), trainer.load_sae(theirs.digest, runs)
    pre = x.numpy() @ p["W_enc"] + p["b_enc"]  # Gemma Scope's own formulas
    y = (pre * (pre > p["threshold"])) @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(torch.tensor(y), sae.decode(sae.encode(x)).detach(), rtol=1e-4, atol=1e-4)
"""


def test_the_three_files_pass_the_contract_tests_and_work_together(tmp_path):
    home = tmp_path / "repository"
    for name in COPIED:  # with numba's cache beside the kernels, so that nothing is compiled again
        source, target = ROOT / name, home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.pyc", "*.png", "golden"))
        else:
            shutil.copy(source, target)
    for name, text in FILES.items():
        assert not (home / name).exists()
        (home / name).write_text(text)
    (home / "tests" / "test_use.py").write_text(USE)
    names = [Path(name).stem for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", " or ".join(names), *CONTRACT, *LEFT_OUT],
        cwd=home, env={**os.environ, "PYTHONPATH": f"{home}:{home}/tests"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for name in names:
        assert len(re.findall(rf"^PASSED .*{name}", done.stdout, re.MULTILINE)) >= 7, done.stdout


def test_there_is_one_file_of_each_kind():
    assert {str(Path(name).parent) for name in FILES} == {"trainer/architectures", "actstore/backends", "trainer/formats"}
    assert len(FILES) == 3
