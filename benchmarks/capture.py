"""How close a capture comes to the model alone, and what it costs to be safe; every ratio within one run.

    python benchmarks/capture.py --quick --json                  # gpt2-medium's shape, layer 12, seq 128; under 4 minutes
    python benchmarks/capture.py --seq-len 64 --seq-len 128 --seq-len 1024 --peer /path/to/saelens/venv/bin/python
    python benchmarks/capture.py --model DIR --hook blocks.15.hook_resid_pre --corpus FILE --rows 40000

The bare forward is the transformers model with sdpa, its first layers only, on the same batches, in a loop that keeps
nothing. A capture is timed from the moment at which model and corpus are ready to the end of the seal; loading is
reported beside it. All variants take turns, and medians are compared:

    ratio_bare_forward  bare forward / capture of one hook point (1 is the floor)
    ratio_three_hooks   capture of three hook points / of one (the last of the three is the one)
    ratio_durable       capture without digests and fsync / capture
    gemm_floor          seconds that the forward's matrix products would take at the measured matrix-product rate / capture

Peak memory is that of `actstore capture` in a process of its own, at seq 1024, 4,096 rows.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from actstore import zarr_array
from actstore.backends import load_backend
from actstore.capture import CaptureRequest, Progress, capture, default_batch_tokens
from actstore.pipeline import padded
from actstore.sequences import Sequences

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-gpt2"
BATCH_TOKENS = default_batch_tokens("cpu")
QUICK_ROWS = 3072
LAYER = 12


def gpt2_medium_shape(folder: Path) -> Path:
    """Write a model of gpt2-medium's shape and random weights, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=24, n_embd=1024, n_head=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for path in TINY.glob("*tok*.json"):
        shutil.copy(path, folder)
    return folder


def random_text(folder: Path, tokens: int) -> Path:
    """Write a corpus of at least so many tokens."""
    rng, path = random.Random(0), folder / "corpus.jsonl"
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(2000)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(tokens // 500 + 1):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=600))}) + "\n")
    return path


@dataclass
class Run:
    """One timed capture."""

    seconds: float
    loading: float
    timeline: dict[str, float]


def timed_capture(request: CaptureRequest) -> Run:
    """Capture into a fresh folder; the clock starts when model and corpus are ready."""
    began, ready = time.perf_counter(), []
    progress = Progress(on_corpus=lambda report: ready.append(time.perf_counter()))
    with tempfile.TemporaryDirectory(dir=request.stores) as stores:
        capture(replace(request, stores=Path(stores)), progress)
        end = time.perf_counter()
    return Run(end - ready[0], ready[0] - began, progress.timeline.shares())


def batches_of(request: CaptureRequest) -> list[np.ndarray]:
    """Return the token ids of each batch that a capture would run."""
    from actstore.capture import derive
    from actstore.corpus import ReadReport

    derived = derive(request)
    with derived.reading(ReadReport()) as sequences:
        sequences.wait()
        return [_batch(sequences, i) for i in sequences.batches_of(0, request.rows or sequences.rows)]  # more may be read


def _batch(sequences: Sequences, index: int) -> np.ndarray:
    first, last = (int(i) for i in sequences.batches[index : index + 2])
    return padded(sequences, first, last)[0]


def bare_forward(request: CaptureRequest, layers: int) -> Callable[[], float]:
    """Return a function that times the model alone on all batches: transformers, sdpa, the first layers, no logits."""
    config = transformers.AutoConfig.from_pretrained(request.model)
    config.num_hidden_layers = layers
    model = transformers.AutoModel.from_pretrained(request.model, config=config, attn_implementation="sdpa")
    model.eval()
    batches = [torch.from_numpy(tokens) for tokens in batches_of(request)]

    def run() -> float:
        with torch.inference_mode():
            model(input_ids=batches[0][:1])
            start = time.perf_counter()
            for tokens in batches:
                model(input_ids=tokens, use_cache=False)
        return time.perf_counter() - start

    return run


@contextlib.contextmanager
def careless() -> Iterator[None]:
    """Take digests and fsync out: what safety costs is what is left."""

    class NoDigest:
        def update(self, data: Any) -> None:
            pass

        def hexdigest(self) -> str:
            return "0" * 64

    sync, sha256, extend = os.fsync, hashlib.sha256, zarr_array.google_crc32c.extend
    os.fsync = lambda descriptor: None
    zarr_array.hashlib = type("hashlib", (), {"sha256": NoDigest})  # type: ignore[assignment]
    zarr_array.google_crc32c.extend = lambda crc, data: 0
    try:
        yield
    finally:
        os.fsync, zarr_array.google_crc32c.extend = sync, extend
        zarr_array.hashlib = hashlib
        assert hashlib.sha256 is sha256


def forward_flops(request: CaptureRequest, layers: int, tokens: int) -> float:
    """Return the floating-point operations of the matrix products of the first layers, attention's included."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(request.model)
        config.num_hidden_layers = layers
        model = transformers.AutoModel.from_config(config)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and (".h." in f".{n}" or ".layers." in f".{n}"))
    heads = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 2.0 * tokens * (matrices + layers * heads * request.seq_len)  # causal: half of 2 products of seq_len columns


def matrix_product_rate(d_model: int) -> float:
    """Return floating-point operations a second of a product of the MLP's shape."""
    a, b = torch.randn(4096, d_model), torch.randn(d_model, 4 * d_model)
    a @ b
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2.0 * 4096 * d_model * 4 * d_model / statistics.median(times)


MEASURED = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_rss(request: CaptureRequest, folder: Path) -> dict[str, float]:
    """Run `actstore capture` at seq 1024 in a process of its own; return its peak memory and the weights' size, in MB."""
    backend = load_backend("auto", request.model, None, "auto", "cpu", request.hooks)
    seq_len = min(1024, backend.context or 1024)
    command = [
        str(Path(sys.executable).parent / "actstore"), "capture", "--model", request.model, "--hook", request.hooks[-1],
        *(word for path in request.corpus for word in ("--corpus", str(path))), "--rows", "4096",
        "--seq-len", str(seq_len),
        "--batch-tokens", str(BATCH_TOKENS), "--stores", str(folder / "rss"), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Through a small process: until its exec a child counts the memory of the one that starts it as its own.
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True, env=environment)
    peak = int(done.stdout.splitlines()[-1]) / 1024
    return {"peak_rss_mb": round(peak, 1), "weights_mb": round(backend.weight_bytes(list(request.hooks[-1:])) / 2**20, 1)}


PEER = """
import os, sys, json, time, warnings
os.environ["HF_HUB_OFFLINE"] = "1"; os.environ["WANDB_MODE"] = "disabled"; warnings.filterwarnings("ignore")
import numpy as np, torch, datasets
datasets.disable_progress_bars()
import sae_lens.cache_activations_runner as car
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
tokens, folder = np.load(sys.argv[1]), sys.argv[2]
n, seq = tokens.shape
torch.manual_seed(0)
model = HookedTransformer(HookedTransformerConfig(n_layers=24, d_model=1024, n_ctx=1024, d_head=64, n_heads=16, d_vocab=50257,
    act_fn="gelu_new", normalization_type="LN", device="cpu")).eval()
car.load_model = lambda **k: model
per = max(1, 4096 // seq)
rows = datasets.Dataset.from_dict({"tokens": np.concatenate([tokens, tokens[:per]]).tolist()})
def config(where, n):
    return CacheActivationsRunnerConfig(dataset_path="x", model_name="m", model_batch_size=per,
        hook_name="blocks.12.hook_resid_pre", d_in=1024, training_tokens=n * seq, context_size=seq,
        new_cached_activations_path=where, device="cpu", streaming=False,
        prepend_bos=False, shuffle=False, buffer_size_gb=1.01 * per * seq * 1024 * 4 / 1e9)
out = []
for i in range(int(sys.argv[3])):
    runner = CacheActivationsRunner(config(f"{folder}/cache{i}", n), override_dataset=rows)
    start = time.perf_counter(); runner.run(); out.append(time.perf_counter() - start)
print(json.dumps(out))
"""


def peer_seconds(python: str, tokens: list[np.ndarray], folder: Path, times: int) -> list[float]:
    """Time SAELens's CacheActivationsRunner on the same tokens and shape, in its own environment."""
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        done = subprocess.run(
            [python, "-c", PEER, str(folder / "tokens.npy"), cache, str(times)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"the peer failed: {done.stderr[-2000:]}")
    return [float(s) for s in json.loads(done.stdout.splitlines()[-1])]


def measure(request: CaptureRequest, layers: int, rounds: int, three: tuple[str, ...], peer: str | None) -> dict[str, Any]:
    """Run all variants in turn and return their ratios."""
    bare = bare_forward(request, layers)
    bare()
    seconds: dict[str, list[float]] = {"bare": [], "one": [], "three": [], "careless": [], "peer": []}
    runs = []
    for _ in range(rounds):
        seconds["bare"].append(bare())
        runs.append(timed_capture(request))
        seconds["one"].append(runs[-1].seconds)
        if three:
            seconds["three"].append(timed_capture(replace(request, hooks=three)).seconds)
        with careless():
            seconds["careless"].append(timed_capture(request).seconds)
        if peer:
            seconds["peer"] += peer_seconds(peer, batches_of(request), request.stores or Path(), 1)
    of = {name: statistics.median(values) for name, values in seconds.items() if values}
    d_model = int(load_backend("auto", request.model, None, "auto", "cpu", request.hooks).widths(list(request.hooks))[0])
    floor = forward_flops(request, layers, request.rows or 0) / matrix_product_rate(d_model)
    found = {
        "seq_len": request.seq_len,
        "rows": request.rows,
        "rows_per_s": (request.rows or 0) / of["one"],
        "ratio_bare_forward": of["bare"] / of["one"],
        "ratio_durable": of["careless"] / of["one"],
        "gemm_floor": floor / of["one"],
        "loading_s": statistics.median(run.loading for run in runs),
        "timeline": runs[-1].timeline,
        "seconds": seconds,
    }
    if three:
        found["ratio_three_hooks"] = of["three"] / of["one"]
    if peer:
        found["ratio_saelens"] = of["peer"] / of["one"]
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3,072 rows a capture; under 4 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seq-len", type=int, action="append", help="repeatable  [default: 128]")
    parser.add_argument("--rows", type=int, help="rows of each capture  [default: 3072 if quick, else 8192]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a model folder  [default: gpt2-medium's shape, random weights]")
    parser.add_argument("--hook", default=f"blocks.{LAYER}.hook_resid_pre")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--peer", help="python of an environment with sae-lens; only for the default model")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        rows = options.rows or (QUICK_ROWS if options.quick else 8192)
        request = CaptureRequest(
            model=str(options.model or gpt2_medium_shape(folder / "model")), hooks=(options.hook,),
            corpus=(options.corpus or random_text(folder, 4 * rows),), rows=rows, batch_tokens=BATCH_TOKENS, bos=False,
            stores=folder, seq_len=128, device="cpu",
        )  # fmt: skip
        layer = int(options.hook.split(".")[1])
        three = (*(f"blocks.{i}.hook_resid_pre" for i in (layer - 8, layer - 4)), options.hook) if layer > 8 else ()
        found = [
            measure(replace(request, seq_len=seq_len), layer, options.rounds, three, options.peer)
            for seq_len in options.seq_len or [128]
        ]
        memory = peak_rss(request, folder)
    result = {**found[0], **memory, "runs": found, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.json:
        print(json.dumps(result))
        return
    for one in found:
        ratios = ", ".join(f"{k} {v:.3f}" for k, v in one.items() if k.startswith("ratio") or k == "gemm_floor")
        print(f"seq {one['seq_len']}: {one['rows_per_s']:.0f} rows/s; {ratios}; loading {one['loading_s']:.1f} s")
        print("  timeline: " + ", ".join(f"{name} {share:.1%}" for name, share in one["timeline"].items()))
    print(f"peak RSS at seq 1024: {memory['peak_rss_mb']:.0f} MB, of which weights {memory['weights_mb']:.0f} MB")


if __name__ == "__main__":
    main()
