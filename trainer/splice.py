"""The loss of a store's own model with an SAE's reconstruction in the place of what it reconstructs.

The model runs on the store's own tokens, sequence by sequence, in five ways: as it is, with the SAE, with the SAE but at
special tokens and position 0, with zeros, with the store's mean. Losses are means over tokens, in nats:

ce_original, ce_sae, ce_zero_ablation, ce_mean_ablation    cross-entropy of the next token, over `ce_rows` tokens
ce_score        (ce_zero_ablation - ce_sae) / (ce_zero_ablation - ce_original)   (SAELens, SAEBench "loss recovered")
kl_sae, kl_zero_ablation, kl_mean_ablation                 KL(original ‖ replaced), over `kl_rows` tokens
kl_score        (kl_zero_ablation - kl_sae) / kl_zero_ablation                   (SAELens)

`_no_special`: over tokens that are neither special nor at position 0, whose neighbours of that kind keep their own
activations under the SAE; the ablations replace every token. That is SAELens's `exclude_special_tokens`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actstore.backends import OutOfMemoryError, load_backend
from actstore.errors import KeyMismatch, UsageError
from actstore.reader import Store
from trainer import kernels
from trainer.metrics import is_plain
from trainer.sae import Batch, SparseAutoencoder
from trainer.sources import Sources

LOGITS_AT_ONCE = {"cpu": 1 << 24}  # 64 MiB in float32, of which five are held
LOGITS_ON_DEVICE = 1 << 27
Rows = npt.NDArray[np.int64] | range
Replace = Callable[[Tensor, Tensor], Tensor]
NO_SPECIAL = "_no_special"
REPLACED = ("sae", "zero_ablation", "mean_ablation")


def open_model(store: Store, folder: Path | None, device: str, target: Store | None = None) -> Any:
    """Open the model a store was captured from, without loading it, on the fast engine where that can replace the value.

    Args:
        store: the store.
        folder: of a local model; None for a hub model, or for the folder of the recorded name.
        device: "cpu", "cuda" or "mps".
        target: the store whose hook point is replaced; None for `store` itself.

    Raises: UsageError: the folder was not named, or the model cannot be opened. KeyMismatch: other weights.
    """
    key, where = store.key, f"store {store.digest[:12]}"
    if key.backend == "toy":
        raise UsageError("the toy model predicts nothing: it has no loss", where)
    recorded = str(store.manifest.provenance.get("model", ""))
    if key.model.source == "local" and folder is None and not Path(recorded).is_dir():
        raise UsageError(f"the store's model lies in a folder that was called {recorded!r}", where, "name it: --model FOLDER")
    name, revision = str(folder or key.model.name or recorded), None if folder else key.model.revision
    hooks = (key.hook, (target or store).key.hook)
    engine = "transformer_lens" if hooks[1].endswith("hook_normalized") else "auto"
    backend = load_backend(engine, name, revision, key.compute_dtype, device, hooks)
    if (found := backend.fingerprint()) != key.model:
        here, there = (str(m.name or m.digest)[:12] for m in (found, key.model))
        what = f"the weights in {name} have digest {here}, the store's model is {there}"
        raise KeyMismatch(what, where, "name the folder the store was captured from: --model FOLDER; none for a hub model")
    return backend


@torch.no_grad()
def model_loss(
    backend: Any, sae: SparseAutoencoder, sources: Sources, rows: Rows, on_rows: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Return the losses of the module's first lines under their names.

    Args:
        backend: from `open_model`.
        sae: in the units of the stores, on the backend's device.
        sources: one store, or that of a transcoder's input and that of its target.
        rows: the tokens over which losses are averaged, sorted; the sequences they lie in are run whole.
        on_rows: called with the rows just done.

    Raises: UsageError: a crosscoder, a hook point that cannot be replaced, or too little memory.
    """
    target = (sources.targets or sources.inputs)[0]
    if len(sources.stores) - bool(sources.targets) > 1:
        raise UsageError("a crosscoder reconstructs several stores at once: there is no one place to splice it in")
    mean = torch.tensor(target.statistics.mean, dtype=torch.float32, device=backend.device)
    spliced = partial(_spliced, sae, (sources.first.key.center, target.key.center))
    sums: dict[str, float] = defaultdict(float)
    limit = LOGITS_AT_ONCE.get(backend.device, LOGITS_ON_DEVICE) // backend.vocabulary_size
    for tokens, wanted, plain in _batches(sources.first, rows, limit, backend.device):
        masks, original = {"": wanted, NO_SPECIAL: wanted & plain}, None
        passes: list[tuple[str, tuple[str, ...], Replace]] = [
            ("original", ("", NO_SPECIAL), lambda x, y: y),
            ("sae", ("",), spliced),
            ("sae", (NO_SPECIAL,), partial(spliced, at=plain)),
            ("zero_ablation", ("", NO_SPECIAL), lambda x, y: torch.zeros_like(y)),
            ("mean_ablation", ("", NO_SPECIAL), lambda x, y: (mean + _row_mean(y, target.key.center)).expand_as(y)),
        ]
        try:
            found = backend.logits(tokens.clamp_min(0), sources.first.key.hook, target.key.hook, [p[2] for p in passes])
            for (name, suffixes, _), logits in zip(passes, found, strict=True):
                logs = logits.float().log_softmax(-1)
                original = logs if original is None else original
                _add_losses(sums, name, {suffix: masks[suffix] for suffix in suffixes}, tokens, original, logs)
        except OutOfMemoryError as error:
            raise UsageError(f"the device has no memory for the model: {error}", do="choose another --device") from error
        on_rows(int(wanted.sum()))
    return _means(sums, "") | _means(sums, NO_SPECIAL)


def _row_mean(x: Tensor, centred: bool) -> Tensor | float:
    """Return what a centred store's rows lack."""
    return x.float().mean(-1, keepdim=True) if centred else 0.0


def _spliced(sae: SparseAutoencoder, centred: tuple[bool, bool], x: Tensor, y: Tensor, at: Tensor | None = None) -> Tensor:
    """Return the reconstruction of y from x, both (batch, seq_len, d), as float32; where `at` says not, y itself."""
    of_x, of_y = _row_mean(x, centred[0]), _row_mean(y, centred[1])
    rows = Batch((x.float() - of_x).flatten(0, 1), (y.float() - of_y).flatten(0, 1))
    kernel = kernels.choose("fast", x.device, 1, sae.config.n_latents)
    _, residual = sae.squared_error(rows, sae.encode_by(kernel, rows.x), kernel)
    found = (rows.y - residual).view_as(y) + of_y
    return found if at is None else torch.where(at[..., None], found, y.float())


def _add_losses(
    sums: dict[str, float], name: str, masks: dict[str, Tensor], tokens: Tensor, original: Tensor, found: Tensor
) -> None:
    """Add the losses over the tokens that the masks choose; a sequence's last token has no next one (it is padding's)."""
    ce = -found[:, :-1].gather(2, tokens[:, 1:, None].clamp_min(0))[..., 0].double()
    kl = (original.exp() * (original - found)).sum(-1).double()
    for suffix, mask in masks.items():
        with_next = mask[:, :-1] & (tokens[:, 1:] >= 0)
        sums[f"ce_{name}{suffix}"] += float(ce[with_next].sum())
        sums[f"kl_{name}{suffix}"] += float(kl[mask].sum())
        if name == "original":
            sums[f"ce_rows{suffix}"] += int(with_next.sum())
            sums[f"kl_rows{suffix}"] += int(mask.sum())


def _means(sums: dict[str, float], suffix: str) -> dict[str, Any]:
    """Return means and scores from sums, their names with a suffix; None where no token was counted."""
    ce_rows, kl_rows = int(sums[f"ce_rows{suffix}"]), int(sums[f"kl_rows{suffix}"])
    ce = {name: sums[f"ce_{name}{suffix}"] / max(ce_rows, 1) for name in ("original", *REPLACED)}
    kl = {name: sums[f"kl_{name}{suffix}"] / max(kl_rows, 1) for name in REPLACED}
    gap, zero = ce["zero_ablation"] - ce["original"], kl["zero_ablation"]
    found = {f"ce_{name}": value if ce_rows else None for name, value in ce.items()}
    found |= {f"kl_{name}": value if kl_rows else None for name, value in kl.items()}
    found["ce_score"] = (ce["zero_ablation"] - ce["sae"]) / gap if gap else None
    found["kl_score"] = (zero - kl["sae"]) / zero if zero else None
    return {f"{name}{suffix}": value for name, value in {"ce_rows": ce_rows, "kl_rows": kl_rows, **found}.items()}


def _batches(store: Store, rows: Rows, limit: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens (batch, seq_len), padded at the end with -1, which are wanted, and which are neither special nor first.

    Args:
        store: the store.
        rows: that are wanted, sorted.
        limit: tokens of a batch; a longer sequence is a batch of its own.
        device: where they go.
    """
    batch: list[tuple[Tensor, ...]] = []
    for first, wanted in sequences_of(store, rows):
        if batch and (len(batch) + 1) * max(len(wanted), *(len(part[0]) for part in batch)) > limit:
            yield _padded(batch, device)
            batch = []
        numbers = np.arange(first, first + len(wanted))
        batch.append(tuple(map(torch.from_numpy, (store.take("tokens", numbers), wanted, is_plain(store, numbers)))))
    if batch:
        yield _padded(batch, device)


def _padded(batch: list[tuple[Tensor, ...]], device: str) -> tuple[Tensor, Tensor, Tensor]:
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tokens, wanted, plain = (list(parts) for parts in zip(*batch, strict=True))
    return pad(tokens, padding_value=-1).long().to(device), pad(wanted).to(device), pad(plain).to(device)


def sequences_of(store: Store, rows: Rows) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Yield each sequence that holds some of the rows: its first row, and (its length,) which of its rows those are.

    Args:
        store: the store, whose positions count from 0 in each sequence.
        rows: sorted.
    """
    at, seq_len = 0, store.key.sequences.seq_len
    while at < len(rows):
        row = int(rows[at])
        first = row - int(store.read("positions", row, row + 1)[0])
        positions = store.read("positions", first, first + seq_len)
        length = int(np.argmin(np.append(positions == np.arange(len(positions)), False)))
        mine = np.asarray(rows[at : at + length])
        mine = mine[mine < first + length]
        wanted = np.zeros(length, np.bool_)
        wanted[mine - first] = True
        at += len(mine)
        yield first, wanted
