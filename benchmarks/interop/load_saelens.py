"""In an environment with sae-lens: load a folder with `SAE.load_from_disk`, encode and decode rows, save it again."""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE

folder, rows, out = sys.argv[1], torch.from_numpy(np.load(sys.argv[2])), Path(sys.argv[3])
sae = SAE.load_from_disk(folder)
with torch.no_grad():
    codes, rebuilt = sae.encode(rows), sae(rows)
out.mkdir()
sae.save_model(out)
np.save(out / "codes.npy", codes.numpy())
np.save(out / "reconstruction.npy", rebuilt.numpy())
print(type(sae).__name__)
