"""Where weight gradients are written: memory that is used again in each step, and added to where it already holds one.

A weight gradient of a large dictionary takes longer to allocate than to compute: each step's fresh pages are cleared by
the system (80 ms for 256 MiB, ../shared/research/kernels.md, section 3). So the backward passes of the fast kernels
write into `parameter.grad` themselves, and return None for it to autograd; `recycle` keeps the memory for the next step.
`torch.autograd.grad` and hooks on the weight matrices therefore see nothing; `--kernel reference` is plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_spare: WeakIdKeyDictionary = WeakIdKeyDictionary()  # gradient memory of the last step, by parameter


def recycle(parameters: Iterable[Tensor]) -> None:
    """Take the gradients away (they become None) and keep their memory for the next backward pass."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.dim() == 2:
            _spare[parameter] = parameter.grad
        parameter.grad = None


def gradient_memory(parameter: Tensor) -> tuple[Tensor, bool]:
    """Return the parameter's gradient, and whether it holds one to add to; where it does not, all of it must be written.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> gradient_memory(weight)[1], gradient_memory(weight)[1]
        (False, True)
    """
    if parameter.grad is not None:
        return parameter.grad, True
    parameter.grad = _spare.pop(parameter, None)  # type: ignore[no-untyped-call]
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    return parameter.grad, False
