"""In an environment with eai-sparsify: load a folder with `SparseCoder.load_from_disk`, encode and decode, save it again."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes Triton's decoder wherever Triton is installed, on a CPU too
from sparsify import SparseCoder

folder, rows, out = sys.argv[1], torch.from_numpy(np.load(sys.argv[2])), Path(sys.argv[3])
sae = SparseCoder.load_from_disk(folder)
with torch.no_grad():
    values, indices, _ = sae.encode(rows)
    codes = torch.zeros(len(rows), sae.num_latents).scatter_(1, indices, values)
    rebuilt = sae(rows).sae_out
sae.save_to_disk(out)
np.save(out / "codes.npy", codes.numpy())
np.save(out / "reconstruction.npy", rebuilt.numpy())
print(type(sae).__name__)
