"""Dead latents begun anew on rows that are reconstructed badly. Bricken et al. 2023, "Towards Monosemanticity", appendix
"Neuron Resampling".

At four points of the first half of the training: each dead latent gets, as encoder and decoder, the direction of a row
drawn with probability proportional to its squared loss squared; its encoder has a fifth of the mean norm of the living
ones, its bias is 0, its moments of Adam are forgotten.
"""

from __future__ import annotations

import torch

from trainer.config import SaeConfig
from trainer.optimize import DeadLatents
from trainer.sae import Batch, SparseAutoencoder

POINTS = (1 / 8, 2 / 8, 3 / 8, 4 / 8)  # of the training; the paper's 25,000 to 100,000 of 200,000 steps
SHARE_OF_NORM = 0.2


def resamples(config: SaeConfig, step: int) -> bool:
    """Return whether latents are resampled after a step.

    Example:
        >>> from trainer.config import FitConfig, resolve
        >>> (c,) = resolve(FitConfig(rows=800, batch_size=10, dead="resample"), d_model=8, train_rows=800)
        >>> [step for step in range(c.steps) if resamples(c, step)]
        [9, 19, 29, 39]
    """
    return config.dead == "resample" and step + 1 in {max(1, round(p * config.steps)) for p in POINTS}


@torch.no_grad()
def resample_(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, dead: DeadLatents, batch: Batch) -> int:
    """Begin dead latents anew; return how many.

    Args:
        sae: changed.
        optimizer: its moments of these latents are set to zero.
        dead: says which latents are dead, and counts them as active now.
        batch: rows to draw from; the draw follows from the SAE's seed and how often latents were counted.
    """
    which = dead.dead().nonzero()[:, 0]
    if not len(which):
        return 0
    code = sae.encode_sparse(batch.x)
    residual = batch.y - sae.decode_sparse(code, batch.x)
    weights = residual.square().sum(1).square().double().cpu()  # the draw is on the CPU: the same on every device
    generator = torch.Generator().manual_seed(sae.config.seed + int(dead.since.sum()) % (1 << 62))
    drawn = torch.multinomial(weights / weights.sum(), len(which), replacement=True, generator=generator).to(which.device)
    alive = torch.ones(len(sae.W_enc), dtype=torch.bool, device=which.device).index_fill_(0, which, False)
    norm = sae.W_enc[alive].norm(dim=1).mean() if bool(alive.any()) else sae.W_enc.norm(dim=1).mean()
    tiny = torch.finfo(residual.dtype).tiny
    directions = batch.x[drawn] - sae.centre
    sae.W_enc[which] = SHARE_OF_NORM * norm * directions / directions.norm(dim=1, keepdim=True).clamp_min(tiny)
    sae.W_dec[which] = residual[drawn] / residual[drawn].norm(dim=1, keepdim=True).clamp_min(tiny)
    for parameter in sae.parameters():
        if parameter.shape[0] != len(sae.W_enc):
            continue
        if parameter.dim() == 1:
            parameter[which] = 0
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][which] = 0
    dead.since[which] = 0
    return len(which)
