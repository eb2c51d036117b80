"""Our evaluation beside SAELens's `run_evals`: the same SAE, model and tokens, every number both have.

    python benchmarks/interop/evals.py --run RUN --model FOLDER --saelens PYTHON [--runs RUNS] [--stores STORES]

PYTHON is the interpreter of an environment with sae-lens. The store must be packed and start its sequences with BOS: what
SAELens excludes as special tokens is then what `_no_special` leaves out. Both use batches of 4,096 rows, since SAELens's
explained_variance_legacy and relative_reconstruction_bias depend on the batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from actstore.catalog import open_store
from trainer import find_run, load_sae
from trainer.checkpoint import run_sources
from trainer.formats import export_run
from trainer.metrics import BATCH_ROWS, measure
from trainer.splice import model_loss, open_model

HERE = Path(__file__).parent
SAME = {  # our name: SAELens's
    "explained_variance": "explained_variance", "explained_variance_legacy": "explained_variance_legacy", "mse_per_token": "mse",
    "cosine": "cossim", "l0": "l0", "l2_ratio": "l2_ratio", "relative_reconstruction_bias": "relative_reconstruction_bias",
    "ce_score": "ce_loss_score", "ce_original": "ce_loss_without_sae", "ce_sae": "ce_loss_with_sae",
    "ce_zero_ablation": "ce_loss_with_ablation", "kl_score": "kl_div_score", "kl_sae": "kl_div_with_sae",
    "kl_zero_ablation": "kl_div_with_ablation",
}  # fmt: skip
BY_BATCH = {"relative_reconstruction_bias"}  # SAELens's is the mean over batches, ours that of all rows


def main() -> int:
    """Print a line a number; exit 1 if one of those that must agree differs by more than 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--saelens", required=True, metavar="PYTHON")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--batches", type=int, default=4)
    given = parser.parse_args()
    run = find_run(given.run, given.runs)
    sources = run_sources(run, lambda digest: open_store(digest, given.stores))
    rule, sae = sources.first.key.sequences, load_sae(run.path)
    assert rule.packing == "pack" and rule.bos and BATCH_ROWS % rule.seq_len == 0
    rows, backend = range(given.batches * BATCH_ROWS), open_model(sources.first, given.model, "cpu")
    backend.prepare(["unembed"])
    measure(sae, sources, range(64), torch.device("cpu"))  # compiled loops are loaded
    start = time.process_time()
    ours = measure(sae, sources, rows, torch.device("cpu")).numbers()
    measured = time.process_time()
    ours |= model_loss(backend, sae, sources, rows)
    seconds = {"measure": measured - start, "model_loss": time.process_time() - measured}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        export_run(run, "saelens", work / "export")
        np.save(work / "tokens.npy", sources.first.read("tokens", 0, len(rows)).reshape(-1, rule.seq_len).astype(np.int64))
        command = [given.saelens, HERE / "evals_saelens.py", work / "export", given.model.resolve(), work / "tokens.npy"]
        done = subprocess.run([*command, str(BATCH_ROWS // rule.seq_len)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"run {run.digest[:12]} {run.config.arch} {sources.first.key.hook}, {len(rows)} rows, {given.batches} batches")
    worst = 0.0
    for suffix in ("", "_no_special"):
        for name, other in SAME.items():
            a, b = ours[name + suffix], theirs[other + suffix]
            difference = abs(a - b) / abs(b)
            worst = max(worst, 0.0 if name in BY_BATCH else difference)
            print(f"{name + suffix:42} ours {a:14.8g}   SAELens {b:14.8g}   relative {difference:.1e}")
    print(f"largest relative difference, {', '.join(BY_BATCH)} aside: {worst:.1e}")
    print(f"processor seconds, ours: {seconds}; SAELens: {theirs['seconds']:.1f}, no special {theirs['seconds_no_special']:.1f}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
