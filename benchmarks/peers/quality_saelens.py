"""SAELens's SAETrainer on its TopK and BatchTopK training SAEs, its defaults.

To its advantage: rows scaled by its own estimate, a decay over the last fifth, and, as the runs are short, a threshold
average and a dead window that fit into them.
"""

from __future__ import annotations

import tempfile
from itertools import chain

from _quality import BATCH, DEVICE, JOB, ROWS, STEPS, K, N, batches, report, timed, train_rows
from sae_lens import SAE, BatchTopKTrainingSAEConfig, LoggingConfig, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

rows = train_rows()
kind = {"topk": TopKTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig}[JOB["kind"]]
short = {"topk_threshold_lr": max(0.01, 10 / STEPS)} if JOB["kind"] == "batchtopk" else {}
config = kind(d_in=rows.shape[1], d_sae=N, k=K, normalize_activations="expected_average_only_in", device=str(DEVICE), **short)
settings = SAETrainerConfig(
    total_training_samples=ROWS, train_batch_size_samples=BATCH, dead_feature_window=max(8, STEPS // 10),
    n_batches_for_norm_estimate=20, lr=3e-4, lr_end=3e-5, lr_decay_steps=STEPS // 5, device=str(DEVICE),
    logger=LoggingConfig(log_to_wandb=False),
)  # fmt: skip
first = list(zip(range(20), batches(rows), strict=False))  # its estimate of the norm reads batches of its own
provider = chain((x for _, x in first), batches(rows))
trainer = SAETrainer(cfg=settings, sae=TrainingSAE.from_dict(config.to_dict()), data_provider=provider)
seconds = timed(trainer.fit)
with tempfile.TemporaryDirectory() as folder:
    trainer.sae.save_inference_model(folder)
    sae = SAE.load_from_disk(folder, device=str(DEVICE))
report(seconds, sae.encode, sae.decode)
