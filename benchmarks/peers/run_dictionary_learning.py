"""dictionary_learning's TopKTrainer.update."""

from __future__ import annotations

from _common import arguments, report
from dictionary_learning.trainers.top_k import TopKTrainer

batches, n, k = arguments()
trainer = TopKTrainer(
    steps=10_000, activation_dim=batches[0].shape[1], dict_size=n, k=k, layer=0, lm_name="x", auxk_alpha=1 / 32,
    warmup_steps=10, device="cpu", seed=0,
)  # fmt: skip
report(trainer.update, batches)
