"""trainer: train any number of sparse autoencoders from one pass over an activation store.

The public surface. `fit` trains a fleet, `load_sae` loads a finished SAE,
`load_run` shows a run in a notebook.
"""

from trainer.checkpoint import Run, find_run, list_runs, load_sae
from trainer.config import FitConfig, SaeConfig
from trainer.fit import FitProgress, FitResult, fit
from trainer.notebook import LoadedRun, load_run
from trainer.sae import SparseAutoencoder

__all__ = [
    "FitConfig", "FitProgress", "FitResult", "LoadedRun", "Run", "SaeConfig", "SparseAutoencoder",
    "find_run", "fit", "list_runs", "load_run", "load_sae",
]  # fmt: skip
