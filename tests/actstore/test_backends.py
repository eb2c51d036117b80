"""Contract tests over every backend, and the equality of the real one with TransformerLens itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import TINY, activations, shared_fixture
from safetensors.numpy import load_file, save_file

from actstore.backends import backend_names, load_backend
from actstore.errors import FormatError, UsageError

EXAMPLE = ("tiny-gpt2", "blocks.2.hook_resid_pre")  # of a backend that names no other


@pytest.mark.parametrize("name", backend_names())
def test_contract(name):
    model, hook = getattr(import_module(f"actstore.backends.{name}"), "EXAMPLE", EXAMPLE)
    model = str(TINY) if model == "tiny-gpt2" else model
    backend = load_backend(name, model, None, "auto", "cpu")
    assert backend.name == name and backend.fingerprint() == load_backend(name, model, None, "auto", "cpu").fingerprint()
    ids = backend.tokenize(["def f(x):\n    return x", "class A:\n    pass"])
    vocabulary = backend.vocabulary()
    assert len(vocabulary.tokens) == backend.vocabulary_size
    assert "".join(vocabulary.tokens[i] for i in ids[0]) == "def f(x):\n    return x"
    (width,) = backend.widths([hook])
    lengths = [len(ids[0]), len(ids[1])]
    padded = np.zeros((2, max(lengths)), np.int64)
    for row, sequence in zip(padded, ids, strict=True):
        row[: len(sequence)] = sequence
    (together,) = activations(backend, padded, lengths, [hook])
    assert together.shape == (sum(lengths), width) and np.isfinite(together).all()
    (alone,) = activations(backend, np.array([ids[1]], np.int64), [lengths[1]], [hook])
    np.testing.assert_allclose(together[lengths[0] :], alone, atol=2e-5)  # padding changes nothing
    with pytest.raises(UsageError, match="no hook point") as caught:
        backend.widths([hook[:-2] + hook[:-3:-1]])  # hook_resid_per
    assert hook in caught.value.do


def run_with_cache(folder: str, ids: np.ndarray, hooks: list[str]) -> list[np.ndarray]:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(torch.from_numpy(ids))
    return [cache[h].flatten(2).flatten(0, 1).numpy() for h in hooks]


HOOKS = [
    "hook_embed", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid", "blocks.1.hook_resid_post", "blocks.1.hook_attn_out",
    "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.2.ln1.hook_normalized",
]  # fmt: skip


@pytest.mark.parametrize("model", ["tiny-gpt2", "llama-stories260k", "gpt2-char-arthur"])
def test_rows_equal_transformer_lens_run_with_cache(model):
    """Early stop, truncated load and one pass for nine hook points give what a full run of TransformerLens gives."""
    folder = str(TINY) if model == "tiny-gpt2" else str(shared_fixture(model))
    backend = load_backend("transformer_lens", folder, None, "float32", "cpu")
    ids = np.array([backend.tokenize(["once upon a time there was a small class of functions"])[0][:12]] * 2, np.int64)
    widths = backend.widths(HOOKS)
    got = activations(backend, ids, [ids.shape[1]] * 2, HOOKS)
    for hook, width, mine, theirs in zip(HOOKS, widths, got, run_with_cache(folder, ids, HOOKS), strict=True):
        assert mine.shape == (2 * ids.shape[1], width), hook
        np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=hook)


def test_nothing_after_the_last_hook_point_is_loaded_or_computed():
    backend = load_backend("transformer_lens", str(TINY), None, "float32", "cpu")
    activations(backend, np.zeros((1, 4), np.int64), [4], ["blocks.1.hook_resid_pre"])
    assert len(backend._bridge.blocks) == 2
    seen = []
    backend._bridge.blocks[1].register_forward_hook(lambda *a: seen.append("block 1 ended"))
    activations(backend, np.zeros((1, 4), np.int64), [4], ["blocks.1.hook_resid_pre"])
    assert not seen


def test_a_tensor_that_is_not_one_vector_a_token_is_refused():
    backend = load_backend("transformer_lens", str(TINY), None, "float32", "cpu")
    with pytest.raises(UsageError, match="one vector a token"):
        backend.widths(["blocks.0.attn.hook_pattern"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compute_dtypes(dtype):
    backend = load_backend("transformer_lens", str(TINY), None, dtype, "cpu")
    (x,) = activations(backend, np.arange(8, dtype=np.int64)[None], [8], ["blocks.1.hook_resid_pre"])
    assert x.dtype.name == dtype


def test_models_that_cannot_be_opened(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_backend("transformer_lens", str(tmp_path / "no"), None, "auto", "cpu")
    with pytest.raises(UsageError, match="safetensors"):
        load_backend("transformer_lens", str(tmp_path), None, "auto", "cpu")
    with pytest.raises(UsageError) as caught:
        load_backend("transformer_lens", "gpt2-medium", None, "auto", "cpu")
    assert "local folder" in caught.value.do
    with pytest.raises(UsageError, match="no backend"):
        load_backend("nope", "x", None, "auto", "cpu")


@pytest.mark.parametrize(
    ("model_type", "of_its_own"),
    [("evil", "AutoConfig"), ("clip_text_model", "AutoModelForCausalLM")],  # unknown; known, but not as a language model
)
def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(model_type, of_its_own, tmp_path, monkeypatch):
    """transformers asks at a terminal, and takes a "y" from stdin, whatever stdin is."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(f"from transformers import GPT2Config as Config\nopen({str(mark)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {of_its_own: "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises((UsageError, FormatError)):
        load_backend("transformer_lens", str(folder), None, "auto", "cpu").widths(["blocks.0.hook_resid_pre"])
    assert not asked and not mark.exists()


def test_a_hub_id_loads_from_the_cache_with_its_commit_in_the_key(tmp_path):
    """The real code path of a hub id, against a cache laid out as huggingface_hub lays it out, with the hub out of reach."""
    commit = "c0ffee" * 6 + "c0ff"
    repository = tmp_path / "hub" / "models--some--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(TINY, repository / "snapshots" / commit)
    code = """if True:
        import sys, json, numpy as np
        from actstore.backends import load_backend
        backend = load_backend("transformer_lens", "some/tiny", None, "auto", "cpu")
        hooks = ["blocks.1.hook_resid_pre"]
        (x,) = backend.launch(np.arange(8, dtype=np.int64)[None], [8], hooks, ["float32"])()
        print(json.dumps([backend.fingerprint().model_dump(), x.shape]))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    identity, shape = json.loads(result.stdout)
    assert identity == {"source": "hub", "name": "some/tiny", "revision": commit, "digest": None} and shape == [8, 192]


@pytest.mark.parametrize("name", ["transformer_lens", "transformers"])
def test_a_tensor_that_the_files_lack_is_an_error_not_random_numbers(name, tmp_path):
    """transformers gives a missing tensor random values and only logs it; nothing above the last layer needed is missed."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    whole = load_file(TINY / "model.safetensors")
    hooks = ["blocks.1.hook_resid_post"]
    for missing, refused in (
        ("transformer.h.1.mlp.c_fc.weight", True), ("transformer.h.0.ln_1.bias", True), ("transformer.wpe.weight", True),
        ("transformer.h.2.mlp.c_fc.weight", False),
    ):  # fmt: skip
        save_file({k: x for k, x in whole.items() if k != missing}, folder / "model.safetensors", {"format": "pt"})
        backend = load_backend(name, str(folder), None, "auto", "cpu")
        if refused:
            with pytest.raises(FormatError, match=re.escape(missing.removeprefix("transformer."))):
                activations(backend, np.zeros((1, 4), np.int64), [4], hooks)
        else:
            activations(backend, np.zeros((1, 4), np.int64), [4], hooks)


def test_damaged_weights_are_a_format_error(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", weights[:1000], b"\x80\x04pickle" + weights):
        (folder / "model.safetensors").write_bytes(damaged)
        backend = load_backend("transformer_lens", str(folder), None, "auto", "cpu")
        with pytest.raises(FormatError, match="weights"):
            activations(backend, np.zeros((1, 4), np.int64), [4], ["blocks.1.hook_resid_pre"])
