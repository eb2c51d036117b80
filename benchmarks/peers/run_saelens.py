"""SAELens's SAETrainer.step on a TopK SAE."""

from __future__ import annotations

from itertools import cycle

import torch
from _common import arguments, report
from sae_lens import LoggingConfig, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

batches, n, k = arguments()
config = TopKTrainingSAEConfig(d_in=batches[0].shape[1], d_sae=n, k=k, rescale_acts_by_decoder_norm=True)
settings = SAETrainerConfig(
    total_training_samples=10**9, train_batch_size_samples=len(batches[0]), lr=3e-4, lr_end=3e-5,
    logger=LoggingConfig(log_to_wandb=False),
)  # fmt: skip
trainer = SAETrainer(cfg=settings, sae=TrainingSAE.from_dict(config.to_dict()), data_provider=cycle(batches))


def step(i: int, x: torch.Tensor) -> None:
    """Train on one batch."""
    trainer.maybe_reset_sparsity()
    trainer.step(x)
    trainer.n_training_steps += 1


report(step, batches)
