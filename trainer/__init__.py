"""trainer: train any number of sparse autoencoders from one pass over an activation store.

The public surface. `fit` trains a fleet, `load_sae` loads a finished SAE.
"""

from trainer.checkpoint import Run, find_run, list_runs, load_sae
from trainer.config import FitConfig, SaeConfig
from trainer.fit import FitProgress, FitResult, fit
from trainer.sae import SparseAutoencoder

__all__ = [
    "FitConfig", "FitProgress", "FitResult", "Run", "SaeConfig", "SparseAutoencoder",
    "find_run", "fit", "list_runs", "load_sae",
]  # fmt: skip
