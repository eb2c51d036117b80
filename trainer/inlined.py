"""Features as blocks of text that lie in an HTML file and are decoded when they are looked at.

A block is a safetensors file (or JSON), deflated (RFC 1951), in base64: nothing in it can end a script element, whatever
the corpus says. Per store there is the text around all contexts, each row once; per run one block of the numbers that the
table shows; per LATENTS_A_BLOCK latents one of everything else.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import save as save_arrays

from actstore.digests import canonical_json
from actstore.reader import Store
from trainer.features import AFTER, BEFORE, BINS, STRONGEST, Array, Features

LATENTS_A_BLOCK = 256
QUANTILES = 5  # bins that the sampled contexts are shown in
CONTEXTS = ((4_000, 8, 3), (20_000, 5, 2), (1 << 62, 3, 1))  # up to so many latents in a page: strongest contexts, contexts a bin
PEAKS = 6  # tokens of the strongest contexts that the table shows and searches


def deflated(data: bytes) -> str:
    """Return bytes as a block.

    Example:
        >>> zlib.decompress(base64.b64decode(deflated(b"</script>")), wbits=-15)
        b'</script>'
    """
    packer = zlib.compressobj(9, wbits=-15)
    return base64.b64encode(packer.compress(data) + packer.flush()).decode()


def inlined(features: list[Features | None], stores: list[Store | None]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return blocks by name, and for each run what the page needs to know before it opens one, as JSON values.

    Args:
        features: of each run; None where there are none.
        stores: of each run; None where it is not here: then no text can be shown.
    """
    n = sum(f.n_latents for f in features if f is not None)
    strongest, each = next((s, e) for most, s, e in CONTEXTS if n <= most)
    texts: dict[str, tuple[Store, list[Array]]] = {}
    for one, store in zip(features, stores, strict=True):
        if one is not None and store is not None:
            one.check(store)
            texts.setdefault(store.digest, (store, []))[1].append(_contexts(one, strongest, each)[0])
    blocks: dict[str, str] = {}
    rows_of: dict[str, Array] = {}
    known: dict[str, Array] = {}
    for i, (digest, (store, rows)) in enumerate(texts.items()):
        used, tokens = _text(store, rows)
        rows_of[digest], known[digest] = used, tokens
        ids = np.unique(np.concatenate([tokens, *(f.arrays[a].ravel() for f in features if f for a in _tokens(f))]))
        blocks[f"words{i}"] = deflated(canonical_json({str(t): store.vocabulary.text(t) for t in ids.tolist()}))
        arrays = {"tokens": tokens} | {name: store.take(name, used) for name in ("documents", "positions")}
        blocks[f"text{i}"] = deflated(save_arrays(arrays))
    about: list[dict[str, Any]] = []
    for j, (one, store) in enumerate(zip(features, stores, strict=True)):
        about.append({"latents": 0 if one is None else one.n_latents, "text": -1, "strongest": strongest, "each": each})
        if one is not None:
            here = store.digest if store is not None else ""
            about[-1] |= {"text": list(texts).index(here) if here else -1, "logits": one.record.logits is not None}
            about[-1] |= {"subsets": one.record.subsets, "block": LATENTS_A_BLOCK, "bins": BINS, "before": BEFORE, "after": AFTER}
            blocks |= _run_blocks(j, one, strongest, each, rows_of.get(here), known.get(here))
    return blocks, about


def _tokens(features: Features) -> list[str]:
    return [name for name in ("promoted_tokens", "suppressed_tokens") if name in features.arrays]


def _contexts(features: Features, strongest: int, each: int) -> tuple[Array, Array]:
    """Return rows of the store and which contexts these are, as `Latent.by_quantile`; (n, contexts) each, row -1 for none."""
    rows = features.arrays["rows"]
    drawn = (rows[:, STRONGEST:] >= 0).sum(1)
    cuts = np.round(np.arange(QUANTILES + 1) * drawn[:, None] / QUANTILES).astype(int)
    at = cuts[:, :-1, None] + np.arange(each)
    at = np.where(at < cuts[:, 1:, None], STRONGEST + at, -1).reshape(len(rows), -1)
    at = np.concatenate([np.tile(np.arange(strongest), (len(rows), 1)), at], axis=1)
    return np.where(at < 0, -1, np.take_along_axis(rows, np.maximum(at, 0), 1)), np.maximum(at, 0)


def _text(store: Store, rows: list[Array]) -> tuple[Array, Array]:
    """Return the rows around all contexts, ascending, and their tokens."""
    used = np.zeros(store.rows + BEFORE + AFTER, bool)
    for places in rows:
        centres = np.unique(places[places >= 0])
        for offset in range(BEFORE + AFTER + 1):
            used[centres + offset] = True
    found = np.flatnonzero(used[BEFORE : BEFORE + store.rows])
    return found, store.take("tokens", found)


def _run_blocks(
    j: int, features: Features, strongest: int, each: int, used: Array | None, tokens: Array | None
) -> dict[str, str]:
    rows, which = _contexts(features, strongest, each)
    arrays, n = features.arrays, features.n_latents
    at = np.full(rows.shape, -1, np.int32)
    if used is not None and tokens is not None:
        at = np.where(rows < 0, -1, np.searchsorted(used, np.maximum(rows, 0))).astype(np.int32)
    peaks = np.full((n, PEAKS), -1, np.int32)
    if tokens is not None:
        peaks[:, : min(PEAKS, strongest)] = np.where(at < 0, -1, tokens[np.maximum(at, 0)])[:, : min(PEAKS, strongest)]
    table: dict[str, Array] = {
        "density": features.density, "maximum": features.maxima, "mean": features.means, "documents": arrays["documents"],
        "cosine": arrays["cosines"][:, 0], "peaks": peaks,
    }  # fmt: skip
    strips = np.take_along_axis(arrays["strips"], which[:, :, None], 1).astype(np.float32)
    scales = strips.max(2, keepdims=True)
    details: dict[str, Array] = {
        "rows": at, "values": np.take_along_axis(arrays["values"], which, 1), "scales": scales[:, :, 0],
        "strips": np.round(255 * strips / np.maximum(scales, 1e-30)).astype(np.uint8), "tops": arrays["tops"],
        **{name: arrays[name] for name in ("histogram", "neighbours", "cosines", "coactive", "jaccard", "subsets")},
        **{name: arrays[name] for name in arrays if name.startswith(("promoted", "suppressed"))},
    }  # fmt: skip
    exact = {
        name: np.ascontiguousarray(array.astype(np.int32 if array.dtype.kind == "i" else np.float32))
        for name, array in table.items()
    }
    blocks = {f"table{j}": deflated(save_arrays(exact))}  # it is sorted by them
    for start in range(0, n, LATENTS_A_BLOCK):
        part = {name: _small(np.asarray(array)[start : start + LATENTS_A_BLOCK]) for name, array in details.items()}
        blocks[f"latents{j}.{start // LATENTS_A_BLOCK}"] = deflated(save_arrays(part))
    return blocks


def _small(array: Array) -> Array:
    """Return an array as a page reads it: bytes, int32, or float32 with 12 bits of mantissa, which deflates well."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "i":
        return np.ascontiguousarray(array.astype(np.int32))
    bits = np.ascontiguousarray(array.astype(np.float32)).view(np.uint32)
    return ((bits + np.uint32(1 << 10)) & np.uint32(0xFFFFF800)).view(np.float32)
