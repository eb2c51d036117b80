"""The reference study, "SAE at scale: gpt2-medium on the Pile", redone on a store: its loop, its random order, its numbers.

SAE:    two linear layers with PyTorch's default weights and encoder bias, decoder weights those of the encoder transposed,
        decoder bias zero; the code is the top k of signed pre-activations (`trainer.architectures.signed_topk`).
Order:  torch.manual_seed(seed); draws encoder weight and bias, decoder weight and bias, then one randperm an epoch.
Loss:   mean over all elements; Adam, betas (0.9, 0.999), no schedule; the last short batch is kept.
Rows:   those of the first block of the packing rule `reference`, BOS and padding among them, from the first one on.

Source: github.com/ashlrai/mechanistic-interpretability, src/mech_interp/sae/model.py, trainer.py, analysis.py and
docs "SAE at scale"; ../shared/research/ecosystem.md, section 3.2. It trains in seconds, so there are no checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from actstore.errors import TrainingDiverged, UsageError
from actstore.reader import Store
from trainer.architectures import chosen_options
from trainer.checkpoint import Run, create_run, finish_run, new_sae, runs_folder
from trainer.config import FitConfig, SaeConfig, parse_config, resolve
from trainer.fit import FitProgress, environment
from trainer.metrics import measure
from trainer.sae import SparseAutoencoder, Widths
from trainer.sources import as_sources

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"n_latents": 2048, "k": 32, "lr": 1e-3, "seed": 42, "epochs": 5, "batch_size": 128}
FIXED: dict[str, Any] = {
    "arch": "signed_topk", "option": {"study": True}, "holdout": 0.0, "shuffle": "exact", "normalize": "none", "centre": "zero",
    "dead": "none", "aux_alpha": 0.0, "warmup_fraction": 0.0, "decay_fraction": 0.0,
}  # fmt: skip


def study_rows(store: Store) -> int:
    """Return how many rows the study trains on: those of the documents that were padded together first.

    Raises: UsageError: the store has other rows than the study's.
    """
    rule = store.key.sequences
    if rule.pad_together is None:
        raise UsageError(
            f"the store's rows are not the study's: its packing is {rule.packing}",
            f"store {store.digest[:12]}",
            "actstore capture --preset reference",
        )
    documents, starts = np.unique(store.read("documents", 0, store.rows), return_index=True)
    return int(starts[rule.pad_together]) if len(documents) > rule.pad_together else store.rows


def study_config(store: Store, given: Mapping[str, Any]) -> SaeConfig:
    """Return the configuration of the study's run on a store.

    Args:
        store: captured with the packing rule `reference`.
        given: other values for some of SETTINGS.

    Raises: UsageError: a setting that the study fixes, a fleet, or half an epoch.
    """
    for name in set(given) - set(SETTINGS):
        raise UsageError(f"--preset reference fixes --{name.replace('_', '-')}", do=f"it leaves open {', '.join(SETTINGS)}")
    rows = study_rows(store)
    values = {**FIXED, **SETTINGS, **given, "dead_after_rows": rows}
    fleet = parse_config(values, FitConfig, "trainer fit --preset reference")
    if fleet.epochs % 1:
        raise UsageError(f"the study trains whole epochs, not {fleet.epochs}", do="give --epochs a whole number")
    saes = resolve(fleet, store.d_model, rows, chosen_options(fleet))
    if len(saes) > 1:
        raise UsageError("--preset reference trains one SAE", do="give each option one value")
    return saes[0]


def _error(encoder: nn.Linear, decoder: nn.Linear, x: Tensor, k: int) -> Float[Tensor, ""]:
    pre = encoder(x)
    values, indices = pre.topk(k, dim=-1)
    return torch.mean((x - decoder(torch.zeros_like(pre).scatter(-1, indices, values))) ** 2)


def train(
    x: Float[Tensor, "rows d_model"], config: SaeConfig, progress: FitProgress | None = None
) -> tuple[SparseAutoencoder, dict[str, float]]:
    """Train as the study does; torch's own generator stays as it was.

    Args:
        x: float32 rows in the order of the store.
        config: gives n_latents, k, lr, seed, batch_size, and in `rows` the rows of all epochs together; with fewer than one
            epoch's the SAE is the one it begins with.
        progress: callbacks.

    Returns: the SAE, and `initial_loss`, `final_loss` (mean squared error of an element, of the first batch_size rows in
        the order of the store) and `loss_epoch_1` … (unweighted mean of the batches' losses).
    Raises: TrainingDiverged; what `progress.stop` returns.
    """
    progress = progress or FitProgress()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder, decoder = nn.Linear(x.shape[1], config.n_latents), nn.Linear(config.n_latents, x.shape[1])
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=config.lr)
        with torch.no_grad():
            decoder.weight.copy_(encoder.weight.T)
            decoder.bias.zero_()
            found = {"initial_loss": _error(encoder, decoder, x[: config.batch_size], config.k).item()}
        for epoch in range(1, config.rows // len(x) + 1):
            losses, order = [], torch.randperm(len(x))
            for start in range(0, len(x), config.batch_size):
                batch = order[start : start + config.batch_size]
                loss = _error(encoder, decoder, x[batch], config.k)
                if not torch.isfinite(loss):
                    raise TrainingDiverged(f"the loss is {loss.item()} in epoch {epoch}", do="use a smaller --lr")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.item())
                progress.on_step(len(batch), [{"loss": losses[-1]}])
                if (wanted := progress.stop()) is not None:
                    raise wanted
            found[f"loss_epoch_{epoch}"] = sum(losses) / len(losses)
        with torch.no_grad():
            found["final_loss"] = _error(encoder, decoder, x[: config.batch_size], config.k).item()
            sae = new_sae(config, Widths((x.shape[1],)))
            values = (encoder.weight, encoder.bias, decoder.weight.T, decoder.bias)
            for parameter, value in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), values, strict=True):
                parameter.copy_(value)
        return sae.eval(), found


def fit_study(
    store: Store, given: Mapping[str, Any], runs: Path | str | None = None, progress: FitProgress | None = None
) -> tuple[Run, bool]:
    """Train the study's SAE into a finished run; asked for again, it costs nothing.

    Args:
        store: captured with the packing rule `reference`; its documents behind the study's are held out.
        given: as `study_config`.
        runs: folder of runs; default $ACTSTORE_RUNS, else ./runs.
        progress: callbacks.

    Returns: the run, and whether it was finished before this call. Its `train` numbers are those of `train`, its
        `held_out` ones those of the documents that the study does not see, its dead latents those active on no row.
    Raises: as `study_config` and `train`; StoreLocked: another process trains it. StoreDamaged, DiskFull, StorageFailed.
    """
    progress, folder, sources = progress or FitProgress(), runs_folder(runs), as_sources(store)
    config, rows = study_config(store, given), study_rows(store)
    run = create_run(folder, config, sources)
    if run.result is not None:
        return run, True
    with run.lock("a fit"):
        run.write("environment.json", environment(CPU))
        companions = (config.batch_size - 1) * (rows / len(np.unique(store.read("documents", 0, rows))) - 1) / max(rows - 1, 1)
        progress.on_start(
            {
                "saes": 1, "steps": config.rows // rows * -(-rows // config.batch_size), "rows": config.rows, "train_rows": rows,
                "held_out_rows": store.rows - rows, "batch_size": config.batch_size, "device": "cpu", "kernels": ["study"],
                "first_step": 0, "pass": 1, "passes": 1, "companions": companions, "ideal_companions": companions,
                "locked": True, "complaints": [],
            }
        )  # fmt: skip
        x = sources.take(np.arange(rows)).x
        sae, losses = train(x, config, progress)
        with torch.no_grad():
            live = int((sae.encode(x) != 0).any(0).sum())
        behind = np.arange(rows, store.rows)
        held_out = measure(sae, sources, behind, CPU).numbers() if len(behind) else {}
        dead = (config.n_latents - live) / config.n_latents
        numbers = {"train": losses, "held_out": held_out, "dead_fraction": dead, "dead_window_rows": rows}
        finish_run(run, sae, {"format": 1, "rows_seen": config.rows, **numbers})
    return create_run(folder, config, sources), False
