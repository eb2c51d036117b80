"""The compiled loops behind features: what is kept of each latent's activations as they pass by, and who fires with whom.

Each latent is one task's alone and sees its activations in the order of the rows, so the result does not depend on the
number of threads. A histogram's range is a power of two; when a value lies beyond it, the range doubles and bins are
merged in pairs: exact counts in one pass, whatever the scale. The sample is Vitter's Algorithm R (1985), its random
numbers a hash of (latent, row).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from trainer.kernels.compiled import OPTIONS, TASKS, Array, loops, mix

LEFT_OUT, SHOWN, COUNTED = 0, 1, 2  # flags of a row: not even in a context, only there, or counted


class Tallies(NamedTuple):
    """What is kept of n latents, changed by `tally`.

    Args:
        counts, sums: (n,) int64 and float64, rows on which each is active and the sum of its activations there.
        documents, last: (n,) int64 and int32, documents in which it is active, the last of them.
        tops, histogram: (n,) float32 and (n, bins) int32, counts of activations in equal bins of [0, top).
        subsets: (n, n_subsets) int64, rows by subset.
        rows, values: (n, strongest + sampled) int64 and float32, its contexts; row -1 for none.
        seen_in: (n, strongest) int32, documents of the strongest.
        strips: (n, strongest + sampled, before + 1 + after) float32, its activations around each context's row.
    """

    counts: Array
    sums: Array
    documents: Array
    last: Array
    tops: Array
    histogram: Array
    subsets: Array
    rows: Array
    values: Array
    seen_in: Array
    strips: Array


class Rows(NamedTuple):
    """What is known of the rows of a batch, besides their code.

    Args:
        first: row of the store that the batch begins with.
        flags: (rows,) uint8, LEFT_OUT, SHOWN or COUNTED.
        documents, subsets: (rows,) int32; a subset below 0 is none.
    """

    first: int
    flags: Array
    documents: Array
    subsets: Array


@njit(**OPTIONS)
def hashed(a: int, b: int) -> int:
    """Return 63 mixed bits of two numbers."""
    x = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xD1B54A32D192ED03)
    return np.int64(mix(x) >> np.uint64(1))


@njit(**OPTIONS)
def count_into(histogram: Array, top: float, value: float) -> float:
    """Count a positive value in equal bins of [0, top); return the top, a power of two, which grows until it is larger."""
    bins = len(histogram)
    if top == 0:
        top = 2.0 ** np.floor(np.log2(value) + 1)
    while value >= top:
        for b in range(bins // 2):
            histogram[b] = histogram[2 * b] + histogram[2 * b + 1]
        histogram[bins // 2 :] = 0
        top *= 2
    histogram[min(bins - 1, int(value / top * bins))] += 1
    return top


@njit(**OPTIONS)
def slot_among(values: Array, seen_in: Array, value: float, document: int) -> int:
    """Make room among the strongest, largest first and one a document, and return the place; -1 if there is none.

    Entries behind the place, up to the one that goes, are for the caller to move: the last, or the document's own.
    """
    n = len(seen_in)
    if value <= values[n - 1]:
        return -1
    for i in range(n):
        if values[i] > 0 and seen_in[i] == document and value <= values[i]:
            return -1
    place = 0
    while values[place] >= value:
        place += 1
    return place


@njit(**OPTIONS)
def strip_of(strip: Array, before: int, p: int, low: int, high: int, at: Array, factors: Array, rows: Rows) -> None:
    """Write a latent's activations around the row of pair p into a strip; its pairs are [low, high), rows ascending.

    What belongs to another sequence is in it too: who reads it knows where the sequence ends.
    """
    strip[:] = 0
    row, q = at[p], p
    while q > low and row - at[q - 1] <= before:
        q -= 1
    while q < high and at[q] - row < len(strip) - before:
        if rows.flags[at[q]] != LEFT_OUT:
            strip[at[q] - row + before] = factors[q]
        q += 1


@njit(**OPTIONS)
def tally_latent(j: int, begins: Array, at: Array, factors: Array, rows: Rows, kept: Tallies, before: int) -> None:
    """Take one latent's activations of a batch into account; see `tally`."""
    low, high = begins[j], begins[j + 1]
    strongest = kept.seen_in.shape[1]
    sampled = kept.rows.shape[1] - strongest
    values, places, seen_in, strips = kept.values[j], kept.rows[j], kept.seen_in[j], kept.strips[j]
    for p in range(low, high):
        r, value = at[p], factors[p]
        if rows.flags[r] != COUNTED or value <= 0:
            continue
        row, document = rows.first + r, rows.documents[r]
        kept.counts[j] += 1
        kept.sums[j] += value
        if kept.last[j] != document:
            kept.last[j] = document
            kept.documents[j] += 1
        if rows.subsets[r] >= 0:
            kept.subsets[j, rows.subsets[r]] += 1
        kept.tops[j] = count_into(kept.histogram[j], kept.tops[j], value)
        place = slot_among(values, seen_in, value, document)
        if place >= 0:
            goes = place
            while goes < strongest - 1 and not (values[goes] > 0 and seen_in[goes] == document):
                goes += 1
            for i in range(goes, place, -1):
                values[i], places[i], seen_in[i], strips[i] = values[i - 1], places[i - 1], seen_in[i - 1], strips[i - 1]
            values[place], places[place], seen_in[place] = value, row, document
            strip_of(strips[place], before, p, low, high, at, factors, rows)
        drawn = kept.counts[j] - 1
        if drawn >= sampled:
            drawn = hashed(j, row) % kept.counts[j]
        if drawn < sampled:
            values[strongest + drawn], places[strongest + drawn] = value, row
            strip_of(strips[strongest + drawn], before, p, low, high, at, factors, rows)


@loops
def tally(begins: Array, at: Array, factors: Array, rows: Rows, kept: Tallies, before: int) -> None:
    """Take the code of a batch into account.

    Args:
        begins, at, factors: the code by latent, of `compiled.by_latent`; values of 0 or less are not counted.
        rows: of the batch, those of the context before and behind it included.
        kept: changed.
        before: entries of a strip that lie before its row.
    """
    n = len(begins) - 1
    for task in prange(TASKS):
        for j in range(task, n, TASKS):  # not in place here: numba loses what a parallel loop writes into a tuple's arrays
            tally_latent(j, begins, at, factors, rows, kept, before)


@loops
def count_together(begins: Array, at: Array, offsets: Array, indices: Array, first: int, together: Array) -> None:
    """Count for some latents on how many rows each other one is active too.

    Args:
        begins, at: (n + 1,) and (pairs,), the rows of each latent.
        offsets, indices: (rows + 1,) and (pairs,), the latents of each row.
        first: the first of these latents.
        together: (some, n) int32, zeros, written.
    """
    for task in prange(TASKS):
        for j in range(task, len(together), TASKS):
            row = together[j]
            for p in range(begins[first + j], begins[first + j + 1]):
                for q in range(offsets[at[p]], offsets[at[p] + 1]):
                    row[indices[q]] += 1
