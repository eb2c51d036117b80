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
    n = sum(one.n_latents for one in features if one is not None)
    strongest, each = next((s, e) for most, s, e in CONTEXTS if n <= most)
    blocks: dict[str, str] = {}
    texts: dict[str, tuple[int, Array, Array]] = {}  # by store: its number, the rows whose text is shown, their tokens
    both = [(one, store) for one, store in zip(features, stores, strict=True) if one is not None and store is not None]
    for i, here in enumerate({store.digest: store for _, store in both}.values()):
        own = [one for one, its in both if its.digest == here.digest]
        texts[here.digest] = i, *_text(here, own, strongest, each)
        _, used, tokens = texts[here.digest]
        written = [array.ravel() for one in own for name, array in one.arrays.items() if name.endswith("_tokens")]
        ids = np.unique(np.concatenate([tokens, *written])).tolist()
        blocks[f"words{i}"] = deflated(canonical_json({str(token): here.vocabulary.text(token) for token in ids}))
        places = {name: here.take(name, used) for name in ("documents", "positions")}
        blocks[f"text{i}"] = deflated(save_arrays({"tokens": tokens, **places}))
    about: list[dict[str, Any]] = [{"latents": 0} for _ in features]
    for j, (one, store) in enumerate(zip(features, stores, strict=True)):
        if one is not None:
            number, used, known = texts[store.digest] if store is not None else (-1, np.empty(0), None)
            shares = (one.arrays["subset_rows"] / max(1, one.record.rows_counted)).tolist()
            about[j] = {
                "latents": one.n_latents, "text": number, "strongest": strongest, "each": each, "block": LATENTS_A_BLOCK,
                "subsets": list(zip(one.record.subsets, shares, strict=True)), "bins": BINS, "before": BEFORE, "after": AFTER,
                "logits": one.record.logits is not None,
            }  # fmt: skip
            blocks |= _run_blocks(j, one, strongest, each, used, known)
    return blocks, about


def _contexts(features: Features, strongest: int, each: int) -> tuple[Array, Array]:
    """Return rows of the store and which contexts these are, as `Latent.by_quantile`; (n, contexts) each, row -1 for none."""
    rows = features.arrays["rows"]
    drawn = (rows[:, STRONGEST:] >= 0).sum(1)
    cuts = np.round(np.arange(QUANTILES + 1) * drawn[:, None] / QUANTILES).astype(int)
    at = cuts[:, :-1, None] + np.arange(each)
    at = np.where(at < cuts[:, 1:, None], STRONGEST + at, -1).reshape(len(rows), -1)
    at = np.concatenate([np.tile(np.arange(strongest), (len(rows), 1)), at], axis=1)
    return np.where(at < 0, -1, np.take_along_axis(rows, np.maximum(at, 0), 1)), np.maximum(at, 0)


def _text(store: Store, features: list[Features], strongest: int, each: int) -> tuple[Array, Array]:
    """Return the rows around all contexts, ascending, and their tokens."""
    used = np.zeros(store.rows + BEFORE + AFTER, bool)
    for one in features:
        one.check(store)
        places = _contexts(one, strongest, each)[0]
        for offset in range(BEFORE + AFTER + 1):
            used[np.unique(places[places >= 0]) + offset] = True
    found = np.flatnonzero(used[BEFORE : BEFORE + store.rows])
    return found, store.take("tokens", found)


def _run_blocks(j: int, features: Features, strongest: int, each: int, used: Array, tokens: Array | None) -> dict[str, str]:
    """Return the blocks of a run; without tokens its contexts have no rows."""
    rows, which = _contexts(features, strongest, each)
    arrays, n = features.arrays, features.n_latents
    at = np.where((rows < 0) | (tokens is None), -1, np.searchsorted(used, np.maximum(rows, 0)))
    peaks = at[:, :strongest] if tokens is None else np.where(at < 0, -1, tokens[np.maximum(at, 0)])[:, :strongest]
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
    blocks = {
        f"table{j}": deflated(save_arrays({name: _small(array, 0) for name, array in table.items()}))
    }  # it is sorted by them
    for start in range(0, n, LATENTS_A_BLOCK):
        part = {name: _small(np.asarray(array)[start : start + LATENTS_A_BLOCK]) for name, array in details.items()}
        blocks[f"latents{j}.{start // LATENTS_A_BLOCK}"] = deflated(save_arrays(part))
    return blocks


def _small(array: Array, bits: int = 11) -> Array:
    """Return an array as a page reads it: bytes, int32, or float32 rounded by some bits of its mantissa, which deflates well."""
    kinds = {"u": np.uint8, "i": np.int32, "f": np.float32}
    found = np.ascontiguousarray(array.astype(kinds[array.dtype.kind]))
    if array.dtype.kind == "f" and bits:
        found.view(np.uint32)[...] = (found.view(np.uint32) + (1 << bits - 1)) >> bits << bits
    return found
