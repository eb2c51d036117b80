"""How long our metrics take beside SAELens's on the same rows of a store, the model left out of both.

python benchmarks/interop/speed.py --run RUN --saelens PYTHON [--rows 32768] [--runs RUNS] [--stores STORES]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from actstore.catalog import open_store
from trainer import find_run, load_sae
from trainer.formats import export_run
from trainer.metrics import BATCH_ROWS, measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--run", required=True)
parser.add_argument("--saelens", required=True, metavar="PYTHON")
parser.add_argument("--rows", type=int, default=8 * BATCH_ROWS)
parser.add_argument("--runs", type=Path, default=Path("runs"))
parser.add_argument("--stores", type=Path, default=Path("stores"))
given = parser.parse_args()
run = find_run(given.run, given.runs)
store, sae = open_store(run.store, given.stores), load_sae(run.path)
seq_len = store.key.sequences.seq_len
measure(sae, store, range(BATCH_ROWS), torch.device("cpu"))
start, cpu = time.perf_counter(), time.process_time()
ours = measure(sae, store, range(given.rows), torch.device("cpu")).numbers()
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
with tempfile.TemporaryDirectory() as folder:
    export_run(run, "saelens", Path(folder) / "export")
    np.save(Path(folder) / "rows.npy", store[: given.rows].astype(np.float32))
    script = Path(__file__).parent / "speed_saelens.py"
    command = [given.saelens, script, f"{folder}/export", f"{folder}/rows.npy", str(seq_len), str(BATCH_ROWS // seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
if done.returncode:
    raise SystemExit(done.stderr[-3000:])
theirs = json.loads(done.stdout.strip().splitlines()[-1])
print(f"{theirs['rows']} rows, {run.config.n_latents} latents, {torch.get_num_threads()} threads")
print(f"ours {seconds:.2f} s, SAELens {theirs['seconds']:.2f} s: {theirs['seconds'] / seconds:.1f} times as long")
print(f"processor time: ours {cpu:.2f} s, SAELens {theirs['cpu']:.2f} s: {theirs['cpu'] / cpu:.1f} times as much")
print(f"explained_variance {ours['explained_variance']:.9g}, {theirs['explained_variance']:.9g}")
