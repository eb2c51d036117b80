"""Numbers about a reconstruction, streaming in float64: memory does not grow with rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.reader import Store
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources, as_sources

ROWS_AT_ONCE = 4096
SCORES_AT_ONCE = 1 << 24  # 64 MiB of pre-activations: memory grows with neither rows nor latents
DENSITY_BINS = np.arange(-6.0, 0.01, 0.25)  # log10 of the share of rows on which a latent is active


@dataclass(slots=True)
class Sums:
    """Float64 sums over rows, from which every number below follows.

    x is a row to reconstruct, x̂ its reconstruction, μ a fixed shift near the mean that keeps the sums accurate.
    """

    rows: int = 0
    squared_error: float = 0.0  # Σ ‖x - x̂‖²
    squared_norm: float = 0.0  # Σ ‖x - μ‖²
    shifted: npt.NDArray[np.float64] | float = 0.0  # Σ (x - μ), (d_model,)
    cosine: float = 0.0  # Σ cos(x, x̂)
    active: int = 0  # Σ active latents

    def fvu(self) -> float:
        """Fraction of variance unexplained: Σ‖x - x̂‖² / Σ‖x - x̄‖², x̄ the mean of these very rows.

        Source: the standard form since SAELens PR #443; explained variance is 1 - FVU.
        """
        total = self.squared_norm - float(np.sum(np.square(self.shifted))) / max(self.rows, 1)
        return self.squared_error / total if total > 0 else float("nan")


@dataclass(slots=True)
class Measured:
    """What `measure` found: sums over all rows, and over rows that are neither special tokens nor first in a sequence."""

    all_rows: Sums = field(default_factory=Sums)
    no_special: Sums = field(default_factory=Sums)
    counts: npt.NDArray[np.int64] | None = None  # rows on which each latent is active, (n_latents,)

    def numbers(self) -> dict[str, Any]:
        """Return the metrics under their names; a name states its reduction. None stands for "no such rows".

        explained_variance: 1 - FVU over all rows. explained_variance_no_special: without special tokens and position 0.
        mse_per_token: mean over rows of the squared error summed over dimensions. l0: mean number of active latents.
        inactive_fraction: latents active on none of these rows. density: histogram of log10 of activity.
        """
        rows, counts = max(self.all_rows.rows, 1), self.counts
        assert counts is not None
        with np.errstate(divide="ignore"):
            logs = np.log10(counts / rows)
        histogram, _ = np.histogram(np.clip(logs[counts > 0], DENSITY_BINS[0], 0), DENSITY_BINS)
        return {
            "rows": self.all_rows.rows,
            "rows_no_special": self.no_special.rows,
            "fvu": _number(self.all_rows.fvu()),
            "explained_variance": _number(1 - self.all_rows.fvu()),
            "explained_variance_no_special": _number(1 - self.no_special.fvu()),
            "mse_per_token": self.all_rows.squared_error / rows,
            "cosine": self.all_rows.cosine / rows,
            "l0": self.all_rows.active / rows,
            "inactive_fraction": float((counts == 0).mean()),
            "density": {"log10_edges": DENSITY_BINS.tolist(), "latents": histogram.tolist(), "never": int((counts == 0).sum())},
        }


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


@torch.no_grad()
def measure(sae: SparseAutoencoder, stores: Store | Sources, rows: npt.NDArray[np.int64], device: torch.device) -> Measured:
    """Measure an SAE's reconstruction of rows.

    Args:
        sae: in the units of the stores (normalisation folded).
        stores: the stores.
        rows: (n,) int64 sorted row numbers; may be empty.
        device: where the SAE is.
    """
    sources = as_sources(stores)
    found, mesh = Measured(counts=np.zeros(len(sae.latents), np.int64)), sae.mesh
    rows = rows[mesh.rows.rank :: mesh.rows.world]
    means = np.concatenate([s.statistics.mean for s in sources.targets or sources.inputs])
    shift, store = torch.tensor(means, dtype=torch.float64, device=device), sources.first
    special = np.array(store.vocabulary.special, np.int32)
    at_once = max(16, min(ROWS_AT_ONCE, SCORES_AT_ONCE // sae.config.n_latents))
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        rows_in, x = sources.take(batch, device)
        code = sae.encode_sparse(rows_in)
        x_hat = sae.decode_sparse(code, rows_in)
        active = code.values != 0
        before = torch.cat([active.new_zeros(1, dtype=torch.int64), active.cumsum(0)])
        plain = (store.take("positions", batch) > 0) & ~np.isin(store.take("tokens", batch), special)
        per_row = (
            (x.double() - x_hat.double()).square().sum(1),
            (x.double() - shift).square().sum(1),
            x.double() - shift,
            torch.cosine_similarity(x, x_hat, dim=1).double(),
            mesh.latents.sum_(before[code.offsets].diff(), "the active latents"),
        )
        _add(found.all_rows, per_row, torch.ones(len(x), dtype=torch.bool, device=device))
        _add(found.no_special, per_row, torch.from_numpy(plain).to(device))
        assert found.counts is not None
        found.counts += torch.bincount(code.indices[active], minlength=len(sae.latents)).cpu().numpy()
    return found if mesh.world.world == 1 else _of_all(found, sae)


def _of_all(found: Measured, sae: SparseAutoencoder) -> Measured:
    """Return the sums over all ranks: every row and every latent once."""
    counts = torch.zeros(sae.config.n_latents, dtype=torch.int64)
    counts[sae.latents.start : sae.latents.stop] = torch.from_numpy(found.counts)
    found.counts = sae.mesh.world.sum_(counts, "the held-out numbers").numpy()
    names = ("rows", "squared_error", "squared_norm", "cosine", "active")
    for sums in (found.all_rows, found.no_special):
        shifted = np.broadcast_to(sums.shifted, (sae.widths.d_out,))
        numbers = torch.tensor([*(getattr(sums, name) for name in names), *shifted], dtype=torch.float64)
        total = sae.mesh.rows.sum_(numbers, "the held-out numbers").tolist()
        for name, value in zip(names, total, strict=False):
            setattr(sums, name, int(value) if name in ("rows", "active") else value)
        sums.shifted = np.array(total[len(names) :])
    return found


def _add(sums: Sums, per_row: tuple[torch.Tensor, ...], kept: torch.Tensor) -> None:
    error, norm, shifted, cosine, active = (values[kept] for values in per_row)
    sums.rows += int(kept.sum())
    sums.squared_error += float(error.sum())
    sums.squared_norm += float(norm.sum())
    sums.shifted = sums.shifted + shifted.sum(0).cpu().numpy()
    sums.cosine += float(cosine.sum())
    sums.active += int(active.sum())
