"""Values inside a plain transformers model: looked at, or replaced by several others in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

Replace = Callable[[Any, Any], Any]


class Tap(NamedTuple):
    """Where a hook point's value is found: a module, and whether it goes in, comes out, or is normalized in it."""

    module: str
    where: Literal["in", "out", "normalized"]


def hooked(model: Any, tap: Tap, change: Callable[[Any], Any]) -> Any:
    """Call `change` with a tap's value in each forward pass; what it returns takes the value's place, None leaves it.

    A normalized value is only looked at. Returns: torch's handle, to be removed.
    """
    module = model.get_submodule(tap.module)
    if tap.where == "normalized":
        return module.register_forward_pre_hook(lambda m, args: change(_normalized(m, args[0])) and None)

    def before(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(m: Any, args: tuple[Any, ...], out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        return (new, *out[1:]) if isinstance(out, tuple) and new is not None else new

    return (
        module.register_forward_pre_hook(before, with_kwargs=True) if tap.where == "in" else module.register_forward_hook(after)
    )


def _normalized(norm: Any, x: Any) -> Any:
    """Return a LayerNorm's or RMSNorm's value before its weight, in float32 as TransformerLens computes it."""
    import torch

    x = x.float()
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def replaced_logits(model: Any, tokens: Any, layer: Tap | None, read: Tap, write: Tap, replace: Sequence[Replace]) -> Any:
    """Return the logits under each replacement of one value, from one pass: what comes before it is computed once.

    Args:
        model: a causal language model.
        tokens: (batch, seq_len) int64 tensor.
        layer: where the copies begin, at or before `write`; None for the beginning.
        read, write: of the values that `replace` is given, and that it replaces.
        replace: each given the rows at `read` and at `write`, (batch, seq_len, d_model), returns those to go on with.

    Returns: (len(replace), batch, seq_len, vocabulary) in the compute dtype.
    """
    import torch

    n, batch = len(replace), len(tokens)
    seen: dict[str, Any] = {}

    def keep(x: Any) -> None:
        seen["read"] = x[:batch].flatten(2)

    def change(x: Any) -> Any:
        one = x[:batch]  # all copies are the same up to here
        return torch.cat([new(seen["read"], one.flatten(2)).to(x.dtype) for new in replace]).reshape(x.shape)

    with contextlib.ExitStack() as stack:
        if layer is not None:
            stack.callback(hooked(model.base_model, layer, lambda x: x.repeat(n, *[1] * (x.ndim - 1))).remove)
        for tap, act in ((read, keep), (write, change)):
            stack.callback(hooked(model.base_model, tap, act).remove)
        ids = tokens if layer is not None else tokens.repeat(n, 1)
        return model(input_ids=ids, use_cache=False).logits.unflatten(0, (n, batch))
