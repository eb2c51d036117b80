"""Numbers about a reconstruction, streaming in float64: memory does not grow with rows.

Each name states its reduction. x is a row to reconstruct, x̂ its reconstruction, x̄ the mean of the rows measured, N their
number, d their width. `_no_special` at the end of a name: without special tokens and without position 0 of a sequence.

explained_variance           1 - Σ‖x - x̂‖² / Σ‖x - x̄‖²: the standard form since SAELens PR #443 and SAEBench PR #61
fvu                          1 - explained_variance; also Gao et al. 2024's MSE over that of predicting the mean
explained_variance_legacy    mean over rows of 1 - ‖x - x̂‖² / ‖x - x̄_b‖², x̄_b the mean of a batch of `batch_rows` rows
                             (SAELens's and SAEBench's older form: rows near the mean drag it down)
fvu_by_batch                 Σ‖x - x̂‖² / Σ‖x - x̄_b‖² (sparsify's form)
frac_variance_explained      1 - Σ_j var(x_j - x̂_j) / Σ_j var(x_j): forgives a constant offset (dictionary_learning)
mse_per_token                Σ‖x - x̂‖² / N: summed over dimensions (SAELens)
mse_per_element              Σ‖x - x̂‖² / (N d)
nmse_per_token               mean over rows of ‖x - x̂‖² / ‖x‖² (openai/sparse_autoencoder, loss.py)
cosine, l2_ratio             mean over rows of cos(x, x̂), and of ‖x̂‖ / ‖x‖
relative_reconstruction_bias Σ‖x̂‖² / Σ⟨x, x̂⟩: below 1 the SAE shrinks (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 10)
l0                           mean number of latents that are not 0
inactive_fraction            share of latents that are 0 on all these rows
denser_than_1_percent, _10_percent    share of latents active on more than this share of the rows (SAEBench)
density                      histogram of log10 of the share of rows on which a latent is active
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actstore.reader import Store
from trainer import kernels
from trainer.kernels.sharded import Sharded
from trainer.sae import SparseAutoencoder
from trainer.sources import Sources, as_sources

BATCH_ROWS, LEAST_ROWS = 4096, 64  # of a batch; fewer where rows are wide: a few float64 copies of it are held
BATCH_ELEMENTS = 4 << 20
DENSITY_BINS = np.arange(-6.0, 0.01, 0.25)  # log10 of the share of rows on which a latent is active
PER_ROW = ("error", "distance", "by_norm", "cosine", "ratio", "squared_x_hat", "product", "active", "distance_in_batch", "legacy")


@dataclass(slots=True)
class Sums:
    """Float64 sums over rows, from which every number follows. μ is a fixed shift near the mean that keeps them accurate.

    Args:
        counts: rows on which each latent is active, (n_latents,).
        d: width of a row.
        rows: how many.
        of: the sum of each of PER_ROW.
        shifted: Σ (x - μ), (d,).
        residual: Σ (x - x̂), (d,).
    """

    counts: npt.NDArray[np.int64]
    d: int
    rows: int = 0
    of: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PER_ROW, 0.0))
    shifted: npt.NDArray[np.float64] | float = 0.0
    residual: npt.NDArray[np.float64] | float = 0.0

    def numbers(self) -> dict[str, Any]:
        """Return the metrics under their names; None where there are no such rows, or their variance is zero."""
        n, of, counts = self.rows, self.of, self.counts
        with np.errstate(divide="ignore", invalid="ignore"):
            sums = {name: np.float64(value) for name, value in of.items()}
            total = sums["distance"] - np.sum(np.square(self.shifted)) / n
            fvu = sums["error"] / total
            unexplained = (sums["error"] - np.sum(np.square(self.residual)) / n) / total
            found = {
                "fvu": fvu,
                "explained_variance": 1 - fvu,
                "explained_variance_legacy": sums["legacy"] / n,
                "fvu_by_batch": sums["error"] / sums["distance_in_batch"],
                "frac_variance_explained": 1 - unexplained,
                "mse_per_token": sums["error"] / n,
                "mse_per_element": sums["error"] / (n * self.d),
                "nmse_per_token": sums["by_norm"] / n,
                "cosine": sums["cosine"] / n,
                "l2_ratio": sums["ratio"] / n,
                "relative_reconstruction_bias": sums["squared_x_hat"] / sums["product"],
                "l0": sums["active"] / n,
            }
            logs = np.log10(counts / max(n, 1))
        histogram, _ = np.histogram(np.clip(logs[counts > 0], DENSITY_BINS[0], 0), DENSITY_BINS)
        never = int((counts == 0).sum())
        return {
            "rows": n,
            **{name: float(value) if np.isfinite(value) else None for name, value in found.items()},
            "inactive_fraction": never / len(counts),
            "denser_than_1_percent": float((counts > 0.01 * n).mean()),
            "denser_than_10_percent": float((counts > 0.1 * n).mean()),
            "density": {"log10_edges": DENSITY_BINS.tolist(), "latents": histogram.tolist(), "never": never},
        }


@dataclass(slots=True)
class Measured:
    """What `measure` found: sums over all rows, and over rows that are neither special tokens nor first in a sequence."""

    all_rows: Sums
    no_special: Sums
    batch_rows: int

    def numbers(self) -> dict[str, Any]:
        """Return the metrics of both under their names (the module's first lines), and `batch_rows`."""
        plain = {f"{name}_no_special": value for name, value in self.no_special.numbers().items()}
        return {**self.all_rows.numbers(), **plain, "batch_rows": self.batch_rows}


@torch.no_grad()
def measure(
    sae: SparseAutoencoder, stores: Store | Sources, rows: npt.NDArray[np.int64] | range, device: torch.device,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Measured:  # fmt: skip
    """Measure an SAE's reconstruction of rows.

    Args:
        sae: in the units of the stores (normalisation folded).
        stores: the stores.
        rows: (n,) int64 sorted row numbers, or a range; may be empty.
        device: where the SAE is.
        on_rows: called with the rows just measured.
    """
    sources, n_latents = as_sources(stores), sae.config.n_latents
    means = np.concatenate([s.statistics.mean for s in sources.targets or sources.inputs])
    shift, kernel = torch.tensor(means, dtype=torch.float64, device=device), kernels.choose("fast", device, 1, n_latents)
    spread = sae.mesh.latents
    if spread.world > 1:
        kernel = Sharded(kernel, sae.mesh, sae.latents.start)
    at_once = max(LEAST_ROWS, min(BATCH_ROWS, BATCH_ELEMENTS // len(means)))
    all_rows, no_special = (Sums(np.zeros(n_latents, np.int64), len(means)) for _ in range(2))
    for start in range(0, len(rows), at_once):
        numbers = np.asarray(rows[start : start + at_once])
        batch = sources.take(numbers, device)
        code = sae.encode_by(kernel, batch.x)
        _, residual = sae.squared_error(batch, code, kernel)
        x, residual = batch.y.double(), residual.double()
        latents, rows_of = code.indices[code.values != 0] + sae.latents.start, code.rows()[code.values != 0]
        shifted, active = x - shift, spread.sum_(torch.bincount(rows_of, minlength=len(x)), "the active latents")
        per_row = _per_row(x, residual, shifted, active)
        plain = torch.from_numpy(is_plain(sources.first, numbers)).to(device)
        _add(all_rows, per_row, shifted, residual, latents, torch.ones_like(plain))
        _add(no_special, per_row, shifted, residual, latents[plain[rows_of]], plain)
        on_rows(len(numbers))
    for sums in (all_rows, no_special):
        sums.counts = spread.sum_(torch.from_numpy(sums.counts), "how often latents are active").numpy()
    return Measured(all_rows, no_special, at_once)


def is_plain(store: Store, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return of sorted rows whether each is neither a special token (BOS, padding, …) nor the first of its sequence."""
    special = np.array(store.vocabulary.special, np.int32)
    return (store.take("positions", rows) > 0) & ~np.isin(store.take("tokens", rows), special)


def _per_row(x: Tensor, residual: Tensor, shifted: Tensor, active: Tensor) -> dict[str, Tensor]:
    """Return what PER_ROW names, but for what depends on the batch, each (batch,) float64."""
    dot = torch.linalg.vecdot
    norm, error, along, distance = dot(x, x), dot(residual, residual), dot(x, residual), dot(shifted, shifted)
    norm_hat, product = (norm - 2 * along + error).clamp_min(0), norm - along  # of x̂ = x - residual
    over = torch.where(norm > 0, norm, 1.0)  # a row of zeros, as SAELens divides it
    return {
        "error": error, "distance": distance, "by_norm": error / over, "ratio": (norm_hat / over).sqrt(), "active": active,
        "cosine": product / (over * norm_hat).sqrt().clamp_min(1e-300), "squared_x_hat": norm_hat, "product": product,
    }  # fmt: skip


def _add(sums: Sums, per_row: dict[str, Tensor], shifted: Tensor, residual: Tensor, active: Tensor, kept: Tensor) -> None:
    """Add the rows of a batch that `kept` (batch,) chooses; `active` are their active latents, one after another."""
    n = int(kept.sum())
    if not n:
        return
    total = kept.double() @ shifted
    mean = total / n
    around = per_row["distance"] - 2 * (shifted @ mean) + mean @ mean
    columns = {**per_row, "distance_in_batch": around, "legacy": 1 - per_row["error"] / around}
    sums.rows += n
    for name in PER_ROW:
        sums.of[name] += float(columns[name][kept].sum())
    sums.shifted = sums.shifted + total.cpu().numpy()
    sums.residual = sums.residual + (kept.double() @ residual).cpu().numpy()
    sums.counts += torch.bincount(active, minlength=len(sums.counts)).cpu().numpy()
