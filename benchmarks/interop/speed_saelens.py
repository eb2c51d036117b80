"""In an environment with sae-lens: time its sparsity and variance metrics on rows from a file, without a model.

    speed_saelens.py EXPORT ROWS.npy SEQ_LEN BATCH

Its own `get_sparsity_and_variance_metrics` runs as it is; the "model" and the "store" only hand out the rows.
"""

import json
import sys
import time

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.evals import get_sparsity_and_variance_metrics
from sae_lens.training.activation_scaler import ActivationScaler

sae, rows = SAE.load_from_disk(sys.argv[1]), np.load(sys.argv[2], mmap_mode="r")
seq_len, batch = int(sys.argv[3]), int(sys.argv[4])


class Rows:
    """Hands out sequence numbers as tokens, and the rows of these sequences as activations."""

    def __init__(self) -> None:
        self.at = 0

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        """The next n sequences."""
        self.at += n
        return torch.arange(self.at - n, self.at)[:, None].expand(n, seq_len)

    def run_with_cache(self, tokens: torch.Tensor, **options: object) -> tuple[None, dict[str, torch.Tensor]]:
        """The rows of the sequences."""
        first = int(tokens[0, 0]) * seq_len
        taken = torch.from_numpy(rows[first : first + tokens.numel()].copy())
        return None, {sae.cfg.metadata.hook_name: taken.view(*tokens.shape, -1)}


parts = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
every = {f"compute_{name}": True for name in parts} | {"model_kwargs": {}}
n = len(rows) // seq_len // batch
with torch.no_grad():
    for batches in (1, n):  # warm first
        start, cpu, source = time.perf_counter(), time.process_time(), Rows()
        found, _ = get_sparsity_and_variance_metrics(
            sae, source, source, ActivationScaler(), batches, eval_batch_size_prompts=batch, **every
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(
    json.dumps({"seconds": seconds, "cpu": cpu, "rows": n * batch * seq_len, "explained_variance": found["explained_variance"]})
)
