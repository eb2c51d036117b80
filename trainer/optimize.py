"""The learning-rate schedule and the count of dead latents."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trainer.code import SparseCode
from trainer.config import SaeConfig
from trainer.distributed import ALONE, Mesh

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 6.25e-10  # Gao et al. 2024, appendix A.3: losses in units of the variance have small gradients
MAX_GRADIENT_NORM = 1.0  # dictionary_learning's value; keeps the first batches with a massive row from spoiling Adam's moments


def learning_rate(config: SaeConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, constant, linear decay to zero.

    Source: dictionary_learning's TopKTrainer (warm-up, decay to zero from `decay_start`); the decay's gain for SAEs is
    reported in Conerly et al. 2024, Anthropic's April update.

    Example:
        >>> from trainer.config import FitConfig, resolve
        >>> (c,) = resolve(FitConfig(rows=100, batch_size=1, lr=(1.0,)), d_model=8, train_rows=100)
        >>> [round(learning_rate(c, s), 2) for s in (0, 4, 50, 80, 90, 99)]
        [0.2, 1.0, 1.0, 1.0, 0.5, 0.05]
    """
    warmup = max(1, round(config.steps * config.warmup_fraction))
    decay = round(config.steps * config.decay_fraction)
    rate = min(1.0, (step + 1) / warmup)
    if decay:
        rate = min(rate, (config.steps - step) / decay)
    return config.lr * rate


class DeadLatents:
    """Counts, for each latent, the rows since it was last active. A latent is dead beyond `dead_after_rows` of them.

    Args:
        config: gives n_latents and dead_after_rows.
        device: where the counts live.
        mesh: which latents are counted here, and which ranks see other rows.
    """

    def __init__(self, config: SaeConfig, device: torch.device, mesh: Mesh = ALONE) -> None:
        n_latents, self._ranks = len(mesh.latents.share(config.n_latents)), mesh.rows
        self.since: Int[Tensor, " n_latents"] = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._after = config.dead_after_rows

    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Return which latents are dead now."""
        return self.since > self._after

    def update_(self, code: SparseCode, rows: int | None = None) -> None:
        """Count a batch of rows (None: the code's): every latent ages by them, the active ones start again at zero."""
        active = code.indices[code.values != 0]
        self.since += code.batch if rows is None else rows
        if self._ranks.world == 1:
            self.since[active] = 0
            return
        seen = torch.zeros_like(self.since, dtype=torch.int32).index_fill_(0, active, 1)
        self.since.masked_fill_(self._ranks.max_(seen, "which latents are active") > 0, 0)
