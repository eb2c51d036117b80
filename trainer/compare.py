"""Runs side by side: their numbers, and how far each two of one width hold the same directions.

Matching      the assignment of latents to latents whose summed cosine is largest (Hungarian algorithm); its mean cosine is
              the pairwise MCC, of several runs the mean over pairs (PW-MCC, arXiv 2505.20254). Decoder and encoder are matched
              apart; `agreeing` latents have the same partner in both (Paulo & Belrose 2025, arXiv 2501.16615).
MMCS          mean over the latents of one SAE of the largest cosine to any latent of the other; not symmetric (Sharkey et al.
              2022, "Taking features out of superposition").
Splitting     a latent of the smaller SAE has as children its at most CHILDREN nearest latents of the larger one with a
              cosine of at least CHILD_COSINE; fidelity is the mean of the best cosines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from actstore.errors import UsageError
from trainer.checkpoint import Run, load_sae
from trainer.evaluate import held_out_numbers
from trainer.geometry import cosine_histogram, max_cosines, nearest
from trainer.sae import SparseAutoencoder

SHOWN = (
    "rows", "l0", "fvu", "explained_variance", "explained_variance_no_special", "ce_score", "kl_score", "dead_fraction",
    "inactive_fraction", "max_cosine",
)  # fmt: skip
CHILDREN, CHILD_COSINE = 3, 0.3
MAX_COSINES = 1 << 28  # of a matching, 16,384 latents with as many: 1 GiB, and more in scipy
HIGH, MIDDLE = 0.8, 0.5  # bands of fidelity


def summary(run: Run) -> dict[str, Any]:
    """Return what a table shows of a run: its configuration, and numbers on held-out documents, None where not measured."""
    numbers, c = held_out_numbers(run), run.config
    about = {"digest": run.digest, "store": run.store, "hook": run.key["hook"], "arch": c.arch, "kind": run.kind}
    return {**about, "n_latents": c.n_latents, "k": c.k, "seed": c.seed, **{name: numbers.get(name) for name in SHOWN}}


def compare(
    runs: list[Run], threshold: float = 0.9, pairs: bool = True, on_pair: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compare finished runs.

    Args:
        runs: the runs.
        threshold: a latent is shared by two SAEs if the cosine to its partner is at least this.
        pairs: compare latents of each two runs whose rows have the same widths; 190 pairs for 20 runs.
        on_pair: called after each pair.

    Returns: `runs`, a `summary` each; `pairs`, each with the digests `a` and `b` and, of equally many latents, `stability`,
        else `splitting` of the smaller one, a, in the larger one; `pw_mcc`, the mean over pairs of the decoders' mean cosine.
    Raises: UsageError: scipy is missing, or no two different runs are left to pair. StoreNotFound: a run is unfinished.
    """
    if pairs and len({run.digest for run in runs}) < len(runs):
        raise UsageError("a run is named twice", do="name each run once")
    found: dict[str, Any] = {"runs": [summary(run) for run in runs], "pairs": []}
    for i, run in enumerate(runs):
        sae, row = load_sae(run.path), found["runs"][i]
        row["max_cosine"] = row["max_cosine"] or cosine_histogram(max_cosines(sae.W_dec)[0]).model_dump()
        for other in runs[i + 1 :] if pairs else []:
            if other.widths != run.widths:
                continue
            second = load_sae(other.path)
            if run.config.n_latents == other.config.n_latents:
                pair = {"a": run.digest, "b": other.digest, "stability": stability(sae, second, threshold)}
            else:
                (a, small), (b, large) = sorted(((run, sae), (other, second)), key=lambda one: one[0].config.n_latents)
                pair = {"a": a.digest, "b": b.digest, "splitting": splitting(small, large)}
            found["pairs"].append(pair)
            on_pair()
    means = [pair["stability"]["decoder"].get("mean") for pair in found["pairs"] if "stability" in pair]
    measured = [mean for mean in means if mean is not None]
    return {**found, "pw_mcc": float(np.mean(measured)) if measured else None}


def match(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Match each row of the shorter matrix with a row of the other, so that the summed cosine is largest.

    Args:
        a, b: directions of any length.

    Returns: (n,) int64, the row of b that each row of a is matched with, -1 for none; (n,) float32, their cosines, 0 for none.
    Raises: UsageError: scipy is not installed.

    Example:
        >>> partners, cosines = match(torch.tensor([[1.0, 0.1], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> partners.tolist()
        [1, 0]
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UsageError(
            "one-to-one matching needs scipy", do="pip install 'actstore[compare]', or compare with --no-pairs"
        ) from error
    cosines = (F.normalize(a.detach().float(), dim=1) @ F.normalize(b.detach().float(), dim=1).T).cpu().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    partners, found = np.full(len(a), -1, np.int64), np.zeros(len(a), np.float32)
    partners[rows], found[rows] = columns, cosines[rows, columns]
    return partners, found


def stability(a: SparseAutoencoder, b: SparseAutoencoder, threshold: float = 0.9) -> dict[str, Any]:
    """Return how far two SAEs of the same width agree.

    Args:
        a, b: the SAEs, of equally many latents.
        threshold: a latent is shared if the cosine to its partner is at least this.

    Returns: for "decoder" and "encoder" `mean` and `median` cosine of the matching, `shared` (share of latents), `mmcs` of a
        in b and `mmcs_back` of b in a; `agreeing`, the share of latents with the same partner in both, and `shared_in_both`,
        of those that are shared in both with that partner. Of more than MAX_COSINES pairs only the MMCS.
    Raises: as `match`.
    """
    found: dict[str, Any] = {"threshold": threshold}
    if len(a.W_dec) * len(b.W_dec) > MAX_COSINES:
        return {**found, "decoder": _mmcs(a.W_dec, b.W_dec), "encoder": _mmcs(a.W_enc, b.W_enc)}
    partners, shared = [], []
    for name, of_a, of_b in (("decoder", a.W_dec, b.W_dec), ("encoder", a.W_enc, b.W_enc)):
        partner, cosines = match(of_a, of_b)
        partners.append(partner)
        shared.append(cosines >= threshold)
        found[name] = {
            "mean": float(cosines.mean()), "median": float(np.median(cosines)), "shared": float(shared[-1].mean()),
            **_mmcs(of_a, of_b),
        }  # fmt: skip
    same = partners[0] == partners[1]
    return {**found, "agreeing": float(same.mean()), "shared_in_both": float((same & shared[0] & shared[1]).mean())}


def _mmcs(a: Tensor, b: Tensor) -> dict[str, float]:
    return {"mmcs": float(nearest(a, b)[0].mean()), "mmcs_back": float(nearest(b, a)[0].mean())}


def splitting(parents: SparseAutoencoder, children: SparseAutoencoder) -> dict[str, Any]:
    """Return how the latents of a smaller SAE are found in a larger one, by their decoder rows.

    Args:
        parents, children: the smaller and the larger SAE, of the same width.

    Returns: `children`, how many parents have 0, 1, 2 and CHILDREN or more; `fidelity`, the mean best cosine; shares of parents
        whose best cosine is `high` (at least HIGH), `middle` or `low` (below MIDDLE); `mmcs` of parents in children, and back.
    """
    cosines, _ = nearest(parents.W_dec, children.W_dec, min(CHILDREN, len(children.W_dec)))
    best, counts = cosines[:, 0], (cosines >= CHILD_COSINE).sum(1)
    high, low = float((best >= HIGH).double().mean()), float((best < MIDDLE).double().mean())
    return {
        "children": torch.bincount(counts, minlength=CHILDREN + 1).tolist(), "fidelity": float(best.mean()),
        "high": high, "middle": 1 - high - low, "low": low, **_mmcs(parents.W_dec, children.W_dec),
    }  # fmt: skip
