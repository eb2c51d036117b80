"""dictionary_learning's TopKTrainer and BatchTopKTrainer: their own recipe, on rows divided by their root mean square norm."""

from __future__ import annotations

from _quality import DEAD_ROWS, DEVICE, JOB, STEPS, K, N, batches, report, timed, train_rows
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

rows = train_rows()
scale = float(rows.square().sum(1).mean().sqrt())  # normalize_activations of its trainSAE
kind = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[JOB["kind"]]
trainer = kind(
    steps=STEPS, activation_dim=rows.shape[1], dict_size=N, k=K, layer=0, lm_name="-", device=str(DEVICE), seed=JOB["seed"],
    warmup_steps=min(1000, STEPS // 20), decay_start=int(0.8 * STEPS), threshold_start_step=min(1000, STEPS // 2),
)  # fmt: skip
trainer.dead_feature_threshold = DEAD_ROWS
trainer.threshold_beta = min(0.999, 1 - 10 / STEPS)  # its average must have left its first value behind


def train() -> None:
    """Train on all batches."""
    for i, x in enumerate(batches(rows)):
        trainer.update(i, x / scale)


seconds = timed(train)
inference = {"use_threshold": True} if JOB["kind"] == "batchtopk" else {}  # its learned threshold
report(seconds, lambda x: trainer.ae.encode(x / scale, **inference), lambda z: trainer.ae.decode(z) * scale)
