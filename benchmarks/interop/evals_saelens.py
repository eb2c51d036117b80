"""In an environment with sae-lens: `run_evals` on an exported SAE, a local model and given tokens; prints one line of JSON.

    evals_saelens.py EXPORT MODEL TOKENS.npy BATCH

Model and hooks: TransformerLens's TransformerBridge, which takes a local folder (HookedTransformer does not). Tokens come from
SAELens's own ActivationsStore over a data set of ready tokens; they are compared with the file before anything is measured.
"""

import json
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import get_special_token_ids
from transformer_lens.model_bridge import TransformerBridge

export, folder, tokens, batch = sys.argv[1], sys.argv[2], np.load(sys.argv[3]), int(sys.argv[4])
sae = SAE.load_from_disk(export)
model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)


def store() -> ActivationsStore:
    """SAELens's store over the tokens, from the first sequence on."""
    return ActivationsStore.from_sae(
        model, sae, Dataset.from_dict({"tokens": tokens.tolist()}), context_size=tokens.shape[1], streaming=False,
        store_batch_size_prompts=batch,
    )  # fmt: skip


assert (store().get_batch_tokens(len(tokens)).numpy() == tokens).all(), "SAELens serves other tokens"
n = len(tokens) // batch
config = get_eval_everything_config(batch, n, n)
found = {}
for name, excluded in (("", False), ("_no_special", True)):
    start = time.process_time()
    metrics, _ = run_evals(sae, store(), model, ActivationScaler(), config, exclude_special_tokens=excluded)
    flat = {key: value for group in metrics.values() for key, value in group.items()}
    found |= {f"{key}{name}": value for key, value in flat.items()} | {f"seconds{name}": time.process_time() - start}
found["special"] = sorted(get_special_token_ids(model.tokenizer))
print(json.dumps(found))
