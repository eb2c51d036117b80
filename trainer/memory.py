"""How much memory training takes, and which SAEs of a fleet are trained at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actstore.errors import UsageError
from actstore.plan import available_memory
from trainer.config import SaeConfig
from trainer.sae import Widths

COPIES = 4  # of the weights: themselves, two moments of Adam, the gradient
SHARE = 0.9  # of the memory that is available: the rest is for batches and the system


def member_bytes(config: SaeConfig, widths: Widths) -> int:
    """Return the bytes that one SAE of a fleet takes while it is trained.

    Example:
        >>> from trainer.config import FitConfig, resolve
        >>> (config,) = resolve(FitConfig(n_latents=(65536,)), d_model=1024, train_rows=100_000)
        >>> round(member_bytes(config, Widths((1024,))) / 2**30, 2)
        2.0
    """
    d_in, d_out = widths.d_in, widths.d_out
    weights = config.n_latents * (d_in + d_out + 1) + d_out + (d_in * d_out if config.skip else 0)
    return COPIES * 4 * weights + 8 * config.n_latents


def chosen_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one. Raises: UsageError: this torch has no such device.

    Example:
        >>> chosen_device("cpu")
        device(type='cpu')
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, True):
        raise UsageError(f"there is no {name} device for this torch ({torch.__version__})", do="--device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def memory_of(device: torch.device) -> int | None:
    """Return the bytes that training may take on a device, or None where it does not say."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    found = available_memory()
    return None if found is None else int(SHARE * found)


def passes(configs: Sequence[SaeConfig], widths: Widths, limit_bytes: int | None) -> list[list[int]]:
    """Return which SAEs are trained in which pass over the rows, as indices: in order, as many at once as fit.

    Args:
        configs: the fleet.
        widths: of the rows.
        limit_bytes: for all SAEs of a pass; None for no limit.

    Raises: UsageError: one SAE alone does not fit.

    Example:
        >>> from trainer.config import FitConfig, resolve
        >>> fleet = resolve(FitConfig(n_latents=(1024, 2048, 4096)), d_model=512, train_rows=1000)
        >>> passes(fleet, Widths((512,)), limit_bytes=80_000_000)
        [[0, 1], [2]]
    """
    found: list[list[int]] = []
    room = 0
    for i, config in enumerate(configs):
        needed = member_bytes(config, widths)
        if limit_bytes is not None and needed > limit_bytes:
            raise UsageError(
                f"an SAE of {config.n_latents} latents takes {needed / 1e9:.2f} GB, {limit_bytes / 1e9:.2f} GB may be used",
                do="use a smaller --n-latents, or a larger --max-memory",
            )
        if not found or (limit_bytes is not None and needed > room):
            found.append([])
            room = limit_bytes or 0
        found[-1].append(i)
        room -= needed
    return found
