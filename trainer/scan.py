"""The features of runs, from one pass over the rows of their store that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from actstore.content import field_of
from actstore.corpus import find_files, identify_files
from actstore.errors import UsageError
from actstore.reader import Store
from actstore.records import file_records
from trainer import kernels
from trainer.checkpoint import Run, load_sae
from trainer.code import SparseCode
from trainer.effects import logit_effects, open_model
from trainer.features import (
    AFTER,
    BEFORE,
    BINS,
    EFFECTS,
    MAX_SUBSETS,
    NEAREST,
    OUTLIER_NORM,
    SAMPLED,
    STRONGEST,
    Array,
    Features,
    FeaturesRecord,
    load_features,
    save_features,
)  # fmt: skip
from trainer.geometry import nearest
from trainer.kernels.compiled import by_latent
from trainer.kernels.tally import COUNTED, LEFT_OUT, SHOWN, Rows, Tallies, count_together, tally
from trainer.memory import chosen_device
from trainer.sources import Sources

SUBSET_FIELD = "meta.pile_set_name"  # the Pile's
ROWS = 300_000  # rows looked at unless told otherwise: half a minute for 8,192 latents on two cores
ROWS_AT_ONCE = 4096  # the rows of contexts that reach over its ends are encoded twice: under 1 %
PAIRS = 1 << 23  # of a run, kept to see which latents are active together: 32 MiB
LATENTS_AT_ONCE = 256  # compared with all others
LEAST_TOGETHER = 3  # rows that two latents share by chance too easily


class Subsets(NamedTuple):
    """The subsets of a corpus: the field that names them, their names, and (documents + 1) which one each is in; -1 for none."""

    field: str | None = None
    names: list[str] = []
    of: Array = np.full(1, -1, np.int32)


def features_of(
    runs: list[Run], open_sources: Callable[[Run], Sources], *, rows: int | None = None, skip_positions: int = 1,
    model: str | None = None, corpus: tuple[Path, ...] = (), subset_field: str = SUBSET_FIELD, device: str = "auto",
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Features]:  # fmt: skip
    """Return the features of finished runs, in their order; computes those that a run does not have yet.

    Runs of the same stores share one pass over the rows. What is computed is committed into the run, so asking again is
    free. Memory: the rows of a batch and, a run, 10 kB a latent and 64 MiB; it does not grow with the rows.

    Args:
        runs: finished runs.
        open_sources: opens a run's stores.
        rows: look at the first rows, at most this many; None for what the run already has, else ROWS.
        skip_positions: leave out the first positions of a sequence, where massive activations drown all else; rows of a
            norm over 10 medians are left out always. Left out means: neither counted nor shown.
        model: folder or hub id of the model the store is of, for logit effects; None leaves these out.
        corpus: files of the store's corpus, to look up which subset a document is of; empty leaves these out.
        subset_field: the field of a record that names its subset; a dotted path reaches into nested objects.
        device: "auto", "cpu", "cuda" or "mps".
        on_rows: called with the rows done so far and the rows of all passes together.

    Raises: StoreNotFound: an unfinished run, or a store that is not here. UsageError: not the store's model or corpus.
    """
    found: dict[str, Features] = {}
    passes: dict[tuple[str, ...], tuple[Sources, list[Run]]] = {}
    for run in {run.digest: run for run in runs}.values():
        run.finished()
        kept = load_features(run)
        if kept is not None and _serves(kept.record, rows, skip_positions, subset_field if corpus else None):
            found[run.digest] = kept
            continue
        sources = open_sources(run)
        passes.setdefault(tuple(s.digest for s in sources.stores), (sources, []))[1].append(run)
    models = {run.digest: open_model(model, run.key) for run in runs} if model else {}
    known = [_subsets(corpus, subset_field, sources.first) if corpus else Subsets() for sources, _ in passes.values()]
    looked = [min(rows or ROWS, sources.rows) for sources, _ in passes.values()]
    for i, (sources, some) in enumerate(passes.values()):
        before, total = sum(looked[:i]), sum(looked)
        report = lambda done, before=before, total=total: on_rows(before + done, total)  # noqa: E731
        where = chosen_device(device)
        for features in _scan(some, sources, looked[i], skip_positions, known[i], where, report):
            found[features.run.digest] = features
    return [_with_effects(found[run.digest], models.get(run.digest)) for run in runs]


def _serves(record: FeaturesRecord, rows: int | None, skip_positions: int, subset_field: str | None) -> bool:
    """Return whether features that are there are those asked for."""
    rows_fit = rows is None or record.rows == min(rows, record.store_rows)
    return rows_fit and record.skip_positions == skip_positions and subset_field in (None, record.subset_field)


def _subsets(corpus: tuple[Path, ...], field: str, store: Store) -> Subsets:
    """Return the subsets of a store's corpus."""
    files = find_files(list(corpus))
    if identify_files(files).digest != getattr(store.key.corpus, "digest", None):
        raise UsageError(
            "this is not the corpus that the store was captured from", ", ".join(map(str, corpus)),
            "name its files in the same order, or leave --corpus out",
        )  # fmt: skip
    names: dict[str, int] = {}
    values = (field_of(record, field) for _, record in file_records(files))
    of = [names.setdefault(value, len(names)) if isinstance(value, str) else -1 for value in values]
    if not 1 <= len(names) <= MAX_SUBSETS:
        raise UsageError(
            f"the field {field!r} has {len(names)} values in the corpus, allowed: 1 to {MAX_SUBSETS}",
            do="name the field that holds a record's subset with --subset-field",
        )
    return Subsets(field, list(names), np.array([*of, -1], np.int32))


class _Tallied:
    """One run on the way: its SAE, what is kept of its latents, and the pairs of some of its rows."""

    def __init__(self, run: Run, rows: int, n_subsets: int, device: torch.device) -> None:
        n, contexts = run.config.n_latents, STRONGEST + SAMPLED
        self.run, self.sae = run, load_sae(run.path).to(device)
        self.kernel = kernels.choose("fast", device, run.config.k, n)
        whole, real, strip = np.int32, np.float32, BEFORE + 1 + AFTER
        self.kept = Tallies(
            np.zeros(n, np.int64), np.zeros(n), np.zeros(n, np.int64), np.full(n, -1, whole), np.zeros(n, real),
            np.zeros((n, BINS), whole), np.zeros((n, n_subsets), np.int64), np.full((n, contexts), -1),
            np.zeros((n, contexts), real), np.zeros((n, STRONGEST), whole), np.zeros((n, contexts, strip), real),
        )  # fmt: skip
        self.share = min(1.0, PAIRS / (rows * run.config.k))  # of the rows whose pairs are kept
        self.pairs: list[tuple[Array, Array]] = []  # latents of these rows, and how many each row has
        self.room = PAIRS

    @torch.no_grad()
    def add(self, x: torch.Tensor, rows: Rows) -> None:
        """Take a batch into account."""
        code = SparseCode(*(t.cpu() for t in self.sae.encode_by(self.kernel, x)))
        indices, values, offsets = (t.numpy() for t in code)
        begins, at = np.empty(len(self.kept.counts) + 1, np.int64), np.empty(len(indices), np.int64)
        factors = np.empty_like(values)
        by_latent(indices, offsets, values, begins, at, factors)
        tally(begins, at, factors, rows, self.kept, BEFORE)
        mixed = (rows.first + np.arange(code.batch)) * 2654435761 % (1 << 32)  # Knuth's hash: rows of all positions
        chosen = (rows.flags == COUNTED) & (mixed < self.share * (1 << 32))
        of_pairs = np.repeat(chosen, np.diff(offsets)) & (values > 0)
        kept = indices[of_pairs].astype(np.int32)
        if len(kept) <= self.room:
            self.room -= len(kept)
            active = np.add.reduceat(np.append(of_pairs, False), offsets[:-1]) * (np.diff(offsets) > 0)
            self.pairs.append((kept, active[chosen]))

    def arrays(self, subset_rows: Array) -> dict[str, Array]:
        """Return the arrays of `features.shapes_of`, without logit effects."""
        kept = {name: array for name, array in self.kept._asdict().items() if name not in ("last", "seen_in")}
        order = np.argsort(-kept["values"][:, STRONGEST:], axis=1, kind="stable")
        for name in ("rows", "values", "strips"):
            at = order if kept[name].ndim == 2 else order[:, :, None]
            kept[name][:, STRONGEST:] = np.take_along_axis(kept[name][:, STRONGEST:], at, 1)
        np.clip(kept["strips"], 0, np.finfo(np.float16).max, out=kept["strips"])
        n, few = len(kept["counts"]), min(NEAREST, max(1, len(kept["counts"]) - 1))
        cosines, neighbours = torch.zeros(n, few), torch.full((n, few), -1)
        if n > 1:
            cosines, neighbours = nearest(self.sae.W_dec.detach(), self.sae.W_dec.detach(), few, but_itself=True)
        found = {"neighbours": neighbours.numpy(), "cosines": cosines.numpy(), "subset_rows": subset_rows}
        return kept | found | self._coactive(n)

    def _coactive(self, n: int) -> dict[str, Array]:
        """Return for each latent the others of largest Jaccard index |A ∩ B| / |A ∪ B| of the rows they are active on."""
        indices = np.concatenate([np.empty(0, np.int32), *(latents for latents, _ in self.pairs)])
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(counts for _, counts in self.pairs)]))
        begins, at, ones = np.empty(n + 1, np.int64), np.empty(len(indices), np.int32), np.ones(len(indices), np.int8)
        by_latent(indices, offsets, ones, begins, at, ones.copy())
        own, few = np.diff(begins), min(NEAREST, n)
        found = {"coactive": np.full((n, NEAREST), -1), "jaccard": np.zeros((n, NEAREST), np.float32)}
        for first in range(0, n, LATENTS_AT_ONCE):
            some = slice(first, min(n, first + LATENTS_AT_ONCE))
            together = np.zeros((some.stop - first, n), np.int32)
            count_together(begins, at, offsets, indices, first, together)
            together[together < LEAST_TOGETHER] = 0
            together[np.arange(len(together)), np.arange(first, some.stop)] = 0
            best = torch.from_numpy(together / np.maximum(1, own[some, None] + own - together)).topk(few, dim=1)
            found["jaccard"][some, :few] = best.values
            found["coactive"][some, :few] = torch.where(best.values > 0, best.indices, -1)
        return found


def _scan(
    runs: list[Run], sources: Sources, rows: int, skip_positions: int, subsets: Subsets, device: torch.device,
    on_rows: Callable[[int], None],
) -> list[Features]:  # fmt: skip
    """Compute and commit the features of runs of the same stores."""
    store, n_subsets = sources.first, len(subsets.names)
    tallied = [_Tallied(run, rows, n_subsets, device) for run in runs]
    counted, subset_rows = 0, np.zeros(n_subsets, np.int64)
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(rows, start + ROWS_AT_ONCE)
        low, high = max(0, start - BEFORE), min(sources.rows, stop + AFTER)
        x = sources.take(np.arange(low, high), device).x
        norms = x.norm(dim=1).cpu().numpy()
        positions, documents = (np.array(store.read(name, low, high)) for name in ("positions", "documents"))
        flags = np.full(high - low, SHOWN, np.uint8)
        flags[start - low : stop - low] = COUNTED
        flags[(positions < skip_positions) | (norms > OUTLIER_NORM * np.median(norms))] = LEFT_OUT
        of_rows = subsets.of[np.minimum(documents, len(subsets.of) - 1)]
        batch = Rows(low, flags, documents, of_rows)
        for one in tallied:
            one.add(x, batch)
        counted += int((flags == COUNTED).sum())
        subset_rows += np.bincount(of_rows[(flags == COUNTED) & (of_rows >= 0)], minlength=n_subsets)
        for one_store in sources.stores:
            one_store.forget(low)
        on_rows(stop)
    record = FeaturesRecord(
        format=1, store=store.digest, content_digest=store.content_digest, store_rows=sources.rows, rows=rows,
        rows_counted=counted, skip_positions=skip_positions, sha256="0" * 64,
        subset_field=subsets.field, subsets=subsets.names,
    )  # fmt: skip
    return [save_features(one.run, record, one.arrays(subset_rows)) for one in tallied]


def _with_effects(features: Features, model: tuple[Path, str] | None) -> Features:
    """Return features with logit effects, where a model is at hand and they are not there yet."""
    if model is None or features.record.logits is not None:
        return features
    arrays = logit_effects(load_sae(features.run.path).W_dec.detach(), model[0], EFFECTS)
    return save_features(features.run, features.record.model_copy(update={"logits": model[1]}), features.arrays | arrays)
