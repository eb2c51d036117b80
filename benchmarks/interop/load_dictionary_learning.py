"""In an environment with dictionary_learning: load a folder as `utils.load_dictionary` does, encode and decode, save it again."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

try:
    from dictionary_learning.utils import load_dictionary
except ImportError:  # utils imports nnsight and zstandard, which loading a dictionary needs not: the same lines of it
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    def load_dictionary(base_path: str, device: str) -> tuple:
        """What utils.load_dictionary does."""
        config = json.loads((Path(base_path) / "config.json").read_text())
        name = config["trainer"]["dict_class"]
        (kind,) = [getattr(m, name) for m in (dictionary, top_k, batch_top_k, matryoshka_batch_top_k) if hasattr(m, name)][:1]
        k = {"k": config["trainer"]["k"]} if "TopK" in name else {}
        return kind.from_pretrained(f"{base_path}/ae.pt", device=device, **k), config


folder, rows, out = sys.argv[1], torch.from_numpy(np.load(sys.argv[2])), Path(sys.argv[3])
sae, config = load_dictionary(folder, "cpu")
with torch.no_grad():
    codes = sae.encode(rows)
    rebuilt = sae(rows)
out.mkdir()
torch.save(sae.state_dict(), out / "ae.pt")
(out / "config.json").write_text(json.dumps(config))
np.save(out / "codes.npy", codes.numpy())
np.save(out / "reconstruction.npy", rebuilt.numpy())
print(type(sae).__name__)
