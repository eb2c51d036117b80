"""How a step is computed: modules of one interface, equal results within float rounding, chosen at the start.

A kernel module has these functions, differentiable where a gradient makes sense (see `reference` for each):

    encode_topk, encode_batchtopk, encode_over   rows to a SparseCode; the architecture decides which
    squared_error                                of a code's reconstruction, with the residual
    dead_squared_error                           of a reconstruction from dead latents alone (AuxK)
    project_rows_, normalize_rows_               what keeps decoder rows at norm 1

`reference` is plain autograd; `sparse` is torch on any device, `bfloat16` the same with that product; `cpu` is compiled;
`cuda` is Triton.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

DENSE_FRACTION = 0.1  # above this share of active latents the dense products are faster (research/kernels.md, decision 7)
OF_DEVICE = {"cpu": "cpu", "cuda": "cuda"}  # any other device: sparse


def choose(name: str, device: torch.device, k: int, n_latents: int, precision: str = "float32") -> ModuleType:
    """Return the kernel by name: "reference", "sparse", "fast" (the device's own), or "auto".

    "auto" is "fast", unless more than a tenth of the latents is active. There is one kernel of precision bfloat16.

    Example:
        >>> choose("auto", torch.device("cpu"), 32, 2048).__name__, choose("auto", torch.device("cpu"), 512, 2048).__name__
        ('trainer.kernels.cpu', 'trainer.kernels.reference')
    """
    if precision == "bfloat16":
        name = "bfloat16"
    if name == "auto":
        name = "reference" if k > DENSE_FRACTION * n_latents else "fast"
    if name == "fast":
        name = OF_DEVICE.get(device.type, "sparse")
    return import_module(f"{__name__}.{name}")  # only then: each kernel has dependencies of its own
