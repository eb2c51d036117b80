"""The fast engine equals TransformerBridge, hook point by hook point, on small models of every family it knows.

Stated tolerance, float32 on a CPU: the largest difference is below 1e-5 of the largest value of that hook point.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, activations

from actstore.backends import OutOfMemoryError, load_backend
from actstore.backends._folder import TOKENIZER_FILES
from actstore.backends._rows import out_of_memory_named
from actstore.backends.transformers import FAMILIES
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import UsageError

TOLERANCE = 1e-5
VOCABULARY = len(load_backend("transformers", str(TINY), None, "float32", "cpu").vocabulary().tokens)
EPS = 1e-2  # large, so that a norm with another one would be seen
GATED = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None, "tie_word_embeddings": False, "rms_norm_eps": EPS,
}  # fmt: skip
LLAMA_3_1 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
NEOX = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "rotary_pct": 0.5, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "layer_norm_eps": EPS,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256, "layer_norm_epsilon": EPS,
}  # fmt: skip
CONFIGS = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 with a padding token, relu": ("gpt2", {**GPT2, "pad_token_id": 0, "activation_function": "relu", "n_inner": 100}),
    "gpt2, scores by the layer's number": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("llama", GATED),
    "llama 3.1: scaled RoPE, tied": ("llama", {**GATED, "rope_parameters": LLAMA_3_1, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {**GATED, "attention_bias": True, "mlp_bias": True}),
    "mistral with a window": ("mistral", {**GATED, "sliding_window": 8}),
    "qwen2": ("qwen2", GATED),
    "qwen2 with a window": (
        "qwen2", {**GATED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", GATED),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, not parallel": ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
    "gemma2": ("gemma2", {**GATED, "sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
}  # fmt: skip
POINTS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post",
    "ln1.hook_normalized", "ln2.hook_normalized",
)  # fmt: skip


def hooks_of(name: str, layers=(0, 1, 3)) -> list[str]:
    points = [p for p in POINTS if p != "hook_resid_mid" or name != "gpt_neox"]
    return ["hook_embed", *(f"blocks.{i}.{p}" for i in layers for p in points), "ln_final.hook_normalized"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folders of models whose every parameter is perturbed: no norm's weight is 1, no bias 0."""
    import transformers

    made = {}

    def make(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            kind, fields = CONFIGS[name]
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **fields)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder)
            for file in TOKENIZER_FILES:
                if (TINY / file).is_file():
                    shutil.copy(TINY / file, folder)
            made[name] = folder
        return made[name]

    return make


def batch(kind: str) -> tuple[np.ndarray, list[int]]:
    """Tokens (3, 24) and lengths; sequences are longer than every window above."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, 24))
    lengths = [24] * 3 if kind == "full" else [24, 5, 17]
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 0
    return tokens, lengths


def differences(folder, hooks, tokens, lengths, theirs_hooks=None) -> dict[str, float]:
    """The largest difference of each hook point, as a fraction of its largest value."""
    mine = load_backend("transformers", str(folder), None, "float32", "cpu")
    theirs = load_backend("transformer_lens", str(folder), None, "float32", "cpu")
    both = activations(mine, tokens, lengths, hooks), activations(theirs, tokens, lengths, theirs_hooks or hooks)
    assert [x.shape for x in both[0]] == [(sum(lengths), width) for width in mine.widths(hooks)]
    return {h: float(np.abs(a - b).max() / np.abs(b).max()) for h, a, b in zip(hooks, *both, strict=True)}


@pytest.mark.parametrize("kind", ["full", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_hook_point_equals_transformer_bridge(model_folder, name, kind):
    found = differences(model_folder(name), hooks_of(name), *batch(kind))
    assert max(found.values()) < TOLERANCE, {h: d for h, d in found.items() if d >= TOLERANCE}


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_control_a_hook_point_of_the_next_layer_is_another_one(model_folder, name):
    """What the comparison would see of a table that is wrong by a layer, or by a norm."""
    hooks, shifted = hooks_of(name, (1,))[1:-1], hooks_of(name, (2,))[1:-1]
    assert min(differences(model_folder(name), hooks, *batch("full"), theirs_hooks=shifted).values()) > 100 * TOLERANCE


def test_control_without_the_window_the_values_differ(model_folder, tmp_path):
    shutil.copytree(model_folder("mistral with a window"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    hooks = ["blocks.3.hook_resid_pre"]
    tokens, lengths = batch("full")
    with_window = load_backend("transformers", str(model_folder("mistral with a window")), None, "float32", "cpu")
    without = load_backend("transformers", str(tmp_path / "model"), None, "float32", "cpu")
    a, b = (activations(model, tokens, lengths, hooks)[0] for model in (with_window, without))
    assert np.abs(a - b).max() / np.abs(b).max() > 100 * TOLERANCE


def test_only_what_the_last_hook_point_needs_is_loaded_and_computed(model_folder):
    for hook, layers in (
        ("hook_embed", 1), ("blocks.0.hook_resid_pre", 1), ("blocks.2.hook_resid_pre", 2), ("blocks.2.attn.hook_z", 3),
        ("ln_final.hook_normalized", 4),
    ):  # fmt: skip
        backend = load_backend("transformers", str(model_folder("llama")), None, "float32", "cpu")
        backend.prepare([hook])
        assert len(backend._model.layers) == layers and not hasattr(backend._model, "lm_head")
        assert backend.weight_bytes([hook]) == 4 * sum(p.numel() for p in backend._model.parameters())
        backend._model.norm.forward = None  # would be called after the last layer
        activations(backend, *batch("full"), [hook])


def test_the_engine_is_chosen_by_model_and_hook_points(model_folder, tmp_path):
    folder = model_folder("llama")
    for hooks, name in (
        (("blocks.2.hook_resid_pre", "hook_embed"), "transformers"),
        (("blocks.2.hook_resid_pre", "blocks.2.attn.hook_pattern"), "transformer_lens"),
        (("blocks.9.hook_resid_post",), "transformers"),  # which then says that there is no such layer
    ):
        assert load_backend("auto", str(folder), None, "auto", "cpu", hooks).name == name
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    assert load_backend("auto", str(tmp_path / "model"), None, "auto", "cpu", ("hook_embed",)).name == "transformer_lens"
    with pytest.raises(UsageError, match="does not know models of type 'opt'"):
        load_backend("transformers", str(tmp_path / "model"), None, "auto", "cpu")
    with pytest.raises(UsageError, match="no hook point"):
        load_backend("auto", str(folder), None, "auto", "cpu").widths(["blocks.9.hook_resid_post"])


def test_attention_is_in_the_key(model_folder, tiny_corpus, tmp_path):
    for name, attention in (("llama", "sdpa"), ("gemma2", "eager")):
        assert load_backend("transformers", str(model_folder(name)), None, "auto", "cpu").attention == attention
    request = CaptureRequest(str(TINY), ("blocks.1.hook_resid_pre",), (tiny_corpus,), rows=1000, stores=tmp_path)
    key = open_store(capture(request)[0], tmp_path).key
    assert (key.backend, key.attention) == ("transformers", "sdpa")


@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_rows_are_converted_where_the_model_runs(model_folder, compute, stored):
    backend = load_backend("transformers", str(model_folder("llama")), None, compute, "cpu")
    (x,) = activations(backend, *batch("padded"), ["blocks.1.hook_resid_pre"], [stored])
    (as_computed,) = activations(backend, *batch("padded"), ["blocks.1.hook_resid_pre"])
    assert x.dtype.name == stored
    np.testing.assert_array_equal(x, as_computed.astype(x.dtype))


def test_every_family_is_tested():
    assert {kind for kind, _ in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")]
)
def test_errors_by_which_torch_runs_out_of_memory_get_one_name(error):
    with pytest.raises(OutOfMemoryError), out_of_memory_named("cpu"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named("cpu"):
        raise RuntimeError("shapes do not match")


def test_a_deeper_hook_point_loads_more_layers(model_folder):
    folder, (tokens, lengths) = str(model_folder("qwen2 with a window")), batch("full")
    backend = load_backend("transformers", folder, None, "float32", "cpu")
    for hook, layers in (("blocks.1.hook_resid_pre", 1), ("blocks.3.hook_resid_post", 4), ("blocks.1.hook_resid_pre", 4)):
        (x,) = activations(backend, tokens, lengths, [hook])
        assert len(backend._model.layers) == layers
        (y,) = activations(load_backend("transformers", folder, None, "float32", "cpu"), tokens, lengths, [hook])
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral with a window", "gpt_neox", "gemma2"])
def test_logits_with_a_value_replaced_equal_transformer_lens(name, model_folder):
    mine, theirs = (
        load_backend(b, str(model_folder(name)), None, "float32", "cpu") for b in ("transformers", "transformer_lens")
    )
    tokens = torch.from_numpy(batch("full")[0])
    reads = []

    def mixed(x, y):
        reads.append(x)
        return 0.5 * y + 0.1 * x.mean(-1, keepdim=True)

    pairs = [
        ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre"), ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_pre"),
        ("blocks.3.hook_resid_post", "blocks.3.hook_resid_post"), ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
        ("blocks.1.ln2.hook_normalized", "blocks.2.hook_mlp_out"), ("hook_embed", "blocks.2.mlp.hook_post"),
    ]  # fmt: skip
    for read, write in pairs:
        ways = [lambda x, y: y, mixed, lambda x, y: torch.zeros_like(y)]
        found, expected = (torch.stack(list(b.logits(tokens, read, write, ways))) for b in (mine, theirs))
        assert found.shape == (3, *tokens.shape, VOCABULARY)
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max(), (read, write)
        assert (reads[-1] - reads[-2]).abs().max() < TOLERANCE * reads[-1].abs().max()
        assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])
