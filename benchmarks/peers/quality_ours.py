"""actstore's own recipe, its defaults: `trainer fit` on the store itself."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from _quality import BATCH, DEVICE, JOB, ROWS, K, N, report

from actstore.catalog import open_store
from trainer import FitConfig, FitProgress, fit, load_sae

config = FitConfig(
    arch=(JOB["kind"],), n_latents=(N,), k=(K,), seed=(JOB["seed"],), rows=ROWS, batch_size=BATCH, skip_positions=1,
    holdout=JOB["holdout"],
)  # fmt: skip
marks: list[float] = []
progress = FitProgress(
    on_start=lambda about: marks.append(time.perf_counter()), on_step=lambda n, latest: marks.append(time.perf_counter())
)
with tempfile.TemporaryDirectory() as runs:
    store = open_store(JOB["store"], Path(JOB["stores"]))
    marks.append(time.perf_counter())
    (result,) = fit(store, config, runs, device=str(DEVICE), progress=progress)
    sae = load_sae(result.digest, runs).to(DEVICE)
report(marks[-1] - marks[0], sae.encode, sae.decode)  # from the first sample on, reading and checks of the store included
