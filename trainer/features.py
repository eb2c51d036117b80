"""What latents do, as kept in a run: where they fire, how strongly, with which others, and what they write.

`scan.features_of` makes them in one pass over the rows and commits them into the run, where all who ask later find them:

  features.json                      the record: of which rows, with what; the commit point
  features-<16 digits>.safetensors   the numbers, named by their own digest

A latent's contexts are its strongest activations, one a document, and a uniform sample of all of its activations, in
order of strength: cut into bins they show what it fires on at each quantile (Bills et al. 2023, "Language models can
explain neurons in language models", judge explanations by both kinds).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from actstore import durable
from actstore.digests import sha256_pieces
from actstore.errors import FormatError, UsageError
from actstore.key import Digest, Strict
from actstore.limits import MAX_CONFIG_BYTES
from actstore.reader import Store
from trainer.checkpoint import Run
from trainer.latents import Context, Latent, context_at
from trainer.saved import Count, Shapes, read_record, read_tensors, tensor_pieces

RECORD = "features.json"
STRONGEST, SAMPLED = 10, 30  # contexts of a latent: its strongest, one a document; uniformly drawn ones
BEFORE, AFTER = 20, 11  # tokens of a context around the one that it is about, as far as its sequence goes
BINS = 48  # of a histogram of activations; 24 to 48 of them are in use, see `kernels.tally`
NEAREST = 8  # neighbours and co-active latents kept
EFFECTS = 10  # tokens kept that a latent promotes, and that it suppresses
MAX_SUBSETS = 1024  # of a corpus
OUTLIER_NORM = 10.0  # rows longer than this many medians are left out: on them every latent is strongest

Array = npt.NDArray[Any]


class FeaturesRecord(Strict):
    """`features.json`: what the features of a run were computed from.

    Args:
        store, content_digest: of the (first) store read.
        store_rows: rows it has.
        rows: rows looked at, the first ones; `rows_counted` of them were not left out.
        skip_positions: positions at the beginning of a sequence that were left out.
        sha256: of the safetensors file.
        logits: digest or hub name of the model that logit effects were computed with; None without them.
        subset_field: field of the corpus that names subsets; `subsets` their names, in the order of the tensors.
    """

    format: Annotated[int, Field(ge=1, le=1)]
    store: Digest
    content_digest: Digest
    store_rows: Count
    rows: Count
    rows_counted: Count
    skip_positions: Count
    sha256: Digest
    logits: str | None = None
    subset_field: str | None = None
    subsets: Annotated[list[str], Field(max_length=MAX_SUBSETS)] = []


@dataclass(frozen=True)
class Features:
    """The features of a run: arrays over all of its latents. `load_features` or `scan.features_of` give them.

    Args:
        run: the run.
        record: what they were computed from.
        arrays: by name, see `shapes_of`.

    Example:
        >>> features = load_features(run)                        # doctest: +SKIP
        >>> features.latent(7, store).strongest[0].text          # doctest: +SKIP
        ' said that the Senate'
    """

    run: Run
    record: FeaturesRecord
    arrays: dict[str, Array]

    @property
    def n_latents(self) -> int:
        """Latents."""
        return self.run.config.n_latents

    @property
    def density(self) -> npt.NDArray[np.float64]:
        """Share of the rows counted on which each latent is active, (n_latents,)."""
        found: npt.NDArray[np.float64] = self.arrays["counts"] / max(1, self.record.rows_counted)
        return found

    @property
    def maxima(self) -> npt.NDArray[np.float32]:
        """The largest activation of each latent, (n_latents,); 0 for one that was never active."""
        found: npt.NDArray[np.float32] = self.arrays["values"][:, 0]
        return found

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """The mean activation of each latent over the rows on which it is active, (n_latents,)."""
        found: npt.NDArray[np.float64] = self.arrays["sums"] / np.maximum(1, self.arrays["counts"])
        return found

    def check(self, store: Store) -> None:
        """Make sure that the rows these features speak of are in a store. Raises: FormatError."""
        if self.record.rows > store.rows or store.digest != self.record.store:
            raise FormatError(
                "the features are not of this store", str(self.run.path / RECORD), f"delete {RECORD}: it is made again"
            )

    def latent(self, index: int, store: Store) -> Latent:
        """Return all that is known of one latent.

        Args:
            index: 0 to n_latents - 1.
            store: the store the features were computed from; texts and documents are read from it.

        Raises: UsageError: no such latent. StoreDamaged.
        """
        if not 0 <= index < self.n_latents:
            raise UsageError(
                f"the run has no latent {index}", f"run {self.run.digest[:12]}", f"allowed: 0 to {self.n_latents - 1}"
            )
        self.check(store)
        one = {name: array[index] for name, array in self.arrays.items() if name != "subset_rows"}
        top, text = float(one["tops"]), store.vocabulary.text
        drawn = [i for i in range(STRONGEST, len(one["rows"])) if one["rows"][i] >= 0]
        strongest = [i for i in range(STRONGEST) if one["rows"][i] >= 0]

        def pairs(ids: str, values: str) -> list[tuple[int, float]]:
            return [(i, v) for i, v in zip(one[ids].tolist(), one[values].tolist(), strict=True) if i >= 0]

        def effects(kind: str) -> list[tuple[str, float]]:
            found = pairs(f"{kind}_tokens", f"{kind}_logits") if self.record.logits else []
            return [(text(token), logit) for token, logit in found if logit]

        total = max(1, int(one["counts"]))
        shares = dict(zip(self.record.subsets, (one["subsets"] / total).tolist(), strict=True))
        return Latent(
            index, int(one["counts"]), float(self.density[index]), float(self.maxima[index]), float(self.means[index]),
            int(one["documents"]), [top * i / BINS for i in range(BINS + 1)], one["histogram"].tolist(),
            [self._context(store, one, i, 1.0) for i in strongest],
            [self._context(store, one, i, 1 - (rank + 0.5) / len(drawn)) for rank, i in enumerate(drawn)],
            pairs("neighbours", "cosines"), pairs("coactive", "jaccard"), effects("promoted"), effects("suppressed"),
            {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0},
        )  # fmt: skip

    def _context(self, store: Store, one: dict[str, Array], i: int, quantile: float) -> Context:
        """Return context i of a latent's arrays."""
        strip = one["strips"][i].astype(float).tolist()
        return context_at(store, int(one["rows"][i]), BEFORE, strip, float(one["values"][i]), quantile)


def search_latents(features: Features, store: Store, text: str) -> list[tuple[int, int]]:
    """Return the latents that fire on a text, with how many of their contexts are about a token of it, most first.

    Args:
        features: of a run.
        store: the store they were computed from.
        text: any part of its text, over as many tokens as it takes; upper and lower case are the same.

    Raises: UsageError: the text is empty.
    """
    if not text.strip():
        raise UsageError("there is no text to search for", do="name one: --search TEXT")
    features.check(store)
    words = [word.casefold() for word in store.vocabulary.tokens]
    parts = [words[t] if 0 <= t < len(words) else "" for t in store.read("tokens", 0, features.record.rows).tolist()]
    ends, whole = np.cumsum([len(part) for part in parts]), "".join(parts)
    inside, at = np.zeros(len(parts), bool), -1
    while (at := whole.find(text.casefold(), at + 1)) >= 0:
        first, last = np.searchsorted(ends, (at, at + len(text.casefold()) - 1), side="right")
        inside[first : last + 1] = True
    rows = features.arrays["rows"]
    hits = (inside[np.maximum(rows, 0)] & (rows >= 0)).sum(1)
    order = np.lexsort((-features.maxima, -hits))
    return [(int(i), int(hits[i])) for i in order if hits[i]]


def shapes_of(n_latents: int, n_subsets: int, logits: bool) -> Shapes:
    """Return name, shape and dtype of each tensor of the features: those of `kernels.tally.Tallies`, and what follows.

    `neighbours`, `cosines`: latents of the nearest decoder rows. `coactive`, `jaccard`: latents active on the same rows.
    `promoted_tokens` and so on: see `effects.logit_effects`. `subset_rows`: rows counted of each subset. Of contexts, -1
    or 0 stands for none. Activations of strips are float16, cut at its largest number.
    """
    n, contexts, whole = n_latents, STRONGEST + SAMPLED, torch.int32
    few = min(NEAREST, max(1, n - 1))
    shapes: Shapes = {
        "counts": ((n,), torch.int64), "sums": ((n,), torch.float64), "documents": ((n,), torch.int64),
        "tops": ((n,), torch.float32), "histogram": ((n, BINS), whole), "subsets": ((n, n_subsets), torch.int64),
        "rows": ((n, contexts), torch.int64), "values": ((n, contexts), torch.float32),
        "strips": ((n, contexts, BEFORE + 1 + AFTER), torch.float16), "subset_rows": ((n_subsets,), torch.int64),
        "neighbours": ((n, few), whole), "cosines": ((n, few), torch.float32),
        "coactive": ((n, NEAREST), whole), "jaccard": ((n, NEAREST), torch.float32),
    }  # fmt: skip
    for kind in ("promoted", "suppressed") if logits else ():
        shapes |= {f"{kind}_tokens": ((n, EFFECTS), whole), f"{kind}_logits": ((n, EFFECTS), torch.float32)}
    return shapes


def load_features(run: Run) -> Features | None:
    """Return the features a run has, or None; computes nothing. Raises: FormatError: they are damaged."""
    try:
        record = read_record(FeaturesRecord, run.path, RECORD, MAX_CONFIG_BYTES)
        shapes = shapes_of(run.config.n_latents, len(record.subsets), record.logits is not None)
        tensors = read_tensors(run.path, _file(record.sha256), shapes, record.sha256)
    except FileNotFoundError:
        return None
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    ends = {"rows": record.rows, "neighbours": run.config.n_latents, "coactive": run.config.n_latents}
    known = all(
        array.min(initial=0) >= -1 and array.max(initial=-1) < ends[name] for name, array in arrays.items() if name in ends
    )
    if not known or not all(np.isfinite(array).all() for array in arrays.values()):
        raise FormatError(
            "the features are not what a pass over rows gives", str(run.path / RECORD), f"delete {RECORD}: it is made again"
        )
    return Features(run, record, arrays)


def save_features(run: Run, record: FeaturesRecord, arrays: dict[str, Array]) -> Features:
    """Commit features into a run, instead of those that are there. The digest in `record` is filled in."""
    shapes = shapes_of(run.config.n_latents, len(record.subsets), record.logits is not None)
    tensors = {name: torch.from_numpy(arrays[name]).to(dtype) for name, (_, dtype) in shapes.items()}
    data = tensor_pieces(tensors)
    record = record.model_copy(update={"sha256": sha256_pieces(data)})
    with run.lock("features", wait=True):
        durable.write_new(run.path, _file(record.sha256), data, replace=True)
        run.write(RECORD, record.model_dump())
        for name in os.listdir(run.path):
            if name.startswith("features-") and name != _file(record.sha256):
                durable.remove_file(run.path / name)
        durable.remove_tree(run.path / "tmp")
    return Features(run, record, {name: tensor.numpy() for name, tensor in tensors.items()})


def _file(sha256: str) -> str:
    return f"features-{sha256[:16]}.safetensors"
