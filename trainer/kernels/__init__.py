"""How a step is computed: modules of one interface, equal results within float rounding, chosen at the start.

A kernel module has `encode_topk(sae, x, k) -> SparseCode` and `decode(sae, code) -> (batch, d_model)`, both
differentiable.
"""

from __future__ import annotations

from types import ModuleType

from trainer.kernels import reference, sparse

DENSE_FRACTION = 0.1  # above this share of active latents the dense products are faster (research/kernels.md, decision 7)


def choose(name: str, k: int, n_latents: int) -> ModuleType:
    """Return the kernel by name: "reference", "fast", or "auto" (fast unless more than a tenth of the latents is active).

    Example:
        >>> choose("auto", 32, 2048).__name__, choose("auto", 512, 2048).__name__
        ('trainer.kernels.sparse', 'trainer.kernels.reference')
    """
    if name == "reference" or (name == "auto" and k > DENSE_FRACTION * n_latents):
        return reference
    return sparse
