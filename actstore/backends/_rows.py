"""From a model's tensors to rows in main memory: padding left out, converted where they are, brought over, and memory's end.

On CUDA nothing here is waited for but in the function that `delivered` returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy.typing as npt

from actstore.backends import OutOfMemoryError
from actstore.errors import UsageError

OUT_OF_MEMORY = ("not enough memory", "DefaultCPUAllocator", "MPS backend out of memory")


@contextlib.contextmanager
def out_of_memory_named(device: str) -> Iterator[None]:
    """Turn the errors by which torch says that a device has no memory left into OutOfMemoryError."""
    import torch

    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's and Apple's allocators raise it bare
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in text for sign in OUT_OF_MEMORY):
            raise
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        raise OutOfMemoryError(text.splitlines()[0][:200]) from error


def real_rows(x: Any, lengths: list[int]) -> Any:
    """Return the rows of a padded (batch, seq_len, …) tensor that are no padding, (sum of lengths, d_model).

    Example:
        >>> import torch
        >>> real_rows(torch.arange(6.0).reshape(2, 3, 1), [3, 1]).tolist()
        [[0.0], [1.0], [2.0], [3.0]]
    """
    import torch

    rows = x.flatten(2).flatten(0, 1)
    if set(lengths) == {x.shape[1]}:
        return rows
    # By number, counted in main memory: how many a mask on the device selects would have to be waited for.
    real = (torch.arange(x.shape[1])[None, :] < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]
    return rows.index_select(0, to_device(real, x.device))


def to_device(x: Any, device: Any) -> Any:
    """Return a tensor of main memory on a device; on CUDA it is on its way while the caller goes on."""
    import torch

    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


class LastHookPointReachedError(Exception):
    """Ends the forward pass: nothing after the last hook point is computed."""


class Kept:
    """The rows of hook points, kept as the forward pass comes by.

    Args:
        hooks: names of the hook points, the order of delivery.
        lengths: real tokens of each sequence of the batch.
    """

    def __init__(self, hooks: list[str], lengths: list[int]) -> None:
        self._hooks, self._lengths = hooks, lengths
        self._rows: dict[str, Any] = {}

    def keep(self, name: str, x: Any) -> None:
        """Take a hook point's value. Raises: LastHookPointReachedError: it was the last one."""
        self._rows[name] = real_rows(x, self._lengths)
        if len(self._rows) == len(self._hooks):
            raise LastHookPointReachedError

    def delivered(self, dtypes: list[str]) -> Callable[[], list[npt.NDArray[Any]]]:
        """Return what waits for all rows, in these dtypes; see `delivered`. Raises: UsageError: a hook point never came by."""
        if missing := [name for name in self._hooks if name not in self._rows]:
            raise UsageError(f"hook point {missing[0]!r} never fires in this model", do="ask for another one")
        return delivered([self._rows[name] for name in self._hooks], dtypes)


def delivered(rows: list[Any], dtypes: list[str]) -> Callable[[], list[npt.NDArray[Any]]]:
    """Convert rows where they are, start their way to main memory, and return what waits for their arrival.

    On CUDA they travel through page-locked memory on a stream of their own, while the device computes the next batch.

    Example:
        >>> import torch
        >>> [rows.dtype.name for rows in delivered([torch.ones(1, 2)], ["bfloat16"])()]
        ['bfloat16']
    """
    import torch

    rows = [x.to(getattr(torch, dtype)).contiguous() for x, dtype in zip(rows, dtypes, strict=True)]
    if not rows[0].is_cuda:
        here = [x.cpu() for x in rows]
        return lambda: [_to_numpy(x) for x in here]
    arrived, staged = [], []
    for x in rows:
        stream = _copy_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            staged.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True))
            x.record_stream(stream)  # its memory is not given to the next batch before the copy is done
            arrived.append(stream.record_event())

    def wait() -> list[npt.NDArray[Any]]:
        for event in arrived:
            event.synchronize()
        return [_to_numpy(x) for x in staged]

    return wait


@functools.cache
def _copy_stream(device: Any) -> Any:
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _to_numpy(x: Any) -> npt.NDArray[Any]:
    """Return a tensor in main memory as a numpy array of its own dtype; bfloat16 becomes ml_dtypes.bfloat16, bit for bit."""
    import torch

    if x.dtype is torch.bfloat16:
        import ml_dtypes

        bits: npt.NDArray[Any] = x.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    return cast(npt.NDArray[Any], x.numpy())
