"""sparsify's SparseCoder with its trainer's recipe: Adam with its linear schedule, or its default, Signum without one."""

from __future__ import annotations

import torch
from _quality import DEAD_ROWS, DEVICE, JOB, STEPS, K, N, batches, report, timed, train_rows
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from transformers import get_linear_schedule_with_warmup

AUXK = 1 / 32  # its `--auxk_alpha`; 0 by default, which leaves dead latents dead

rows = train_rows()
sae = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=N, k=K), device=DEVICE, dtype=torch.float32)
if JOB["kind"] == "adam":
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (N / 2**14) ** 0.5)
    schedule = get_linear_schedule_with_warmup(optimizer, min(1000, STEPS // 20), STEPS)
else:
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (N / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    schedule = None
since = torch.zeros(N, dtype=torch.int64, device=DEVICE)


def train() -> None:
    """Train on all batches, as `sparsify.Trainer.fit` does."""
    for i, x in enumerate(batches(rows)):
        if i == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=since > DEAD_ROWS)
        (out.fvu + AUXK * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        since.add_(len(x))
        since[out.latent_indices.flatten().unique()] = 0


def codes(x: torch.Tensor) -> torch.Tensor:
    """Return dense codes."""
    found = sae.encode(x)
    return torch.zeros(len(x), N, device=DEVICE).scatter_(1, found.top_indices, found.top_acts)


seconds = timed(train)
if schedule is None:
    optimizer.eval()
report(seconds, codes, lambda z: z @ sae.W_dec + sae.b_dec)
