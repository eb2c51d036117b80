"""sparsify's TopK step: the body of its `Trainer.fit`'s hook and step, without the language model."""

from __future__ import annotations

import torch
from _common import arguments, report
from sparsify import SparseCoder, SparseCoderConfig
from transformers import get_linear_schedule_with_warmup

batches, n, k = arguments()
sae = SparseCoder(batches[0].shape[1], SparseCoderConfig(num_latents=n, k=k), dtype=torch.float32)
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (n / 2**14) ** 0.5)
schedule = get_linear_schedule_with_warmup(optimizer, 1000, 10_000)
since, fired = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)


def step(i: int, x: torch.Tensor) -> None:
    """Train on one batch."""
    if i == 0:
        sae.b_dec.data = x.mean(0)
    sae.set_decoder_norm_to_unit_norm()
    out = sae(x=x, y=x, dead_mask=since > 10_000_000)
    fired[out.latent_indices.flatten()] = True
    (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    since.add_(x.shape[0])
    since[fired] = 0
    fired.zero_()


report(step, batches)
