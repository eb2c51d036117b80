"""The compiled selections of the CPU kernel: the k largest scores of a row, and all scores over a threshold.

Top-k without state and without a bad case: the maxima of strided groups give a bound that at least k scores reach; one
pass of wide comparisons collects the few that reach it; quickselect ends it (../shared/research/kernels.md, section 3).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from trainer.kernels.compiled import LANES, OPTIONS, TASKS, Array, loops, span


@njit(**OPTIONS)
def select(values: Array, indices: Array, m: int, k: int) -> float:
    """Move the k largest of values[:m], and their indices, to the front; return the k-th largest (Hoare 1961)."""
    low, high = 0, m - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                indices[i], indices[j] = indices[j], indices[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    smallest = values[0]
    for i in range(1, k):
        smallest = min(smallest, values[i])
    return smallest


@njit(**OPTIONS)
def group_bound(row: Array, groups: int, maxima: Array, scratch: Array, k: int) -> float:
    """Return a lower bound of the row's k-th largest entry: the k-th largest of the maxima of strided groups.

    Each maximum is an entry of its own, so at least k entries reach the k-th largest maximum.
    """
    width = len(maxima)
    for c in range(width):
        maxima[c] = row[c]
    for g in range(1, groups):
        part = row[g * width : (g + 1) * width]
        for c in range(width):
            maxima[c] = part[c] if part[c] > maxima[c] else maxima[c]
    return select(maxima, scratch, width, k)


@njit(**OPTIONS)
def groups_for(k: int) -> int:
    """Return how many strided maxima to take for the k-th largest."""
    width = 256
    while width < 4 * k:
        width *= 2
    return width


@loops
def topk_rows(scores: Array, k: int, indices: Array, values: Array) -> None:
    """Write the k largest positive scores of each row; where there are fewer, latent 0 with value 0.

    Args:
        scores: (rows, n).
        k: 1 to n.
        indices: (rows, k) int64, written.
        values: (rows, k) of the scores' dtype, written.
    """
    rows, n = scores.shape
    width = groups_for(k)
    capacity = 4 * k + LANES
    for task in prange(TASKS):
        maxima, scratch = np.empty(width, scores.dtype), np.empty(width, np.int32)
        found, at = np.empty(capacity + LANES, scores.dtype), np.empty(capacity + LANES, np.int32)
        low, high = span(task, rows)
        for r in range(low, high):
            row = scores[r]
            bound = scores.dtype.type(0)
            if n >= 2 * width:
                bound = max(bound, group_bound(row, n // width, maxima, scratch, k))
            m = 0
            for begin in range(0, n - LANES + 1, LANES):
                block = row[begin : begin + LANES]
                count = np.int32(0)
                for q in range(LANES):
                    count += np.int32(block[q] >= bound)
                if count > 0:
                    if m + LANES > capacity:
                        bound = select(found, at, m, k)
                        m = k
                    for q in range(LANES):  # append without a branch
                        found[m] = block[q]
                        at[m] = begin + q
                        m += np.int64(block[q] >= bound)
            for j in range(n // LANES * LANES, n):
                if row[j] >= bound:
                    if m >= capacity:
                        bound = select(found, at, m, k)
                        m = k
                    found[m] = row[j]
                    at[m] = j
                    m += 1
            take_best(found, at, m, k, indices[r], values[r])


@njit(**OPTIONS)
def take_best(found: Array, at: Array, m: int, k: int, indices: Array, values: Array) -> None:
    """Write the k largest positive ones of m found scores, the rest as latent 0 with value 0."""
    if m > k:
        select(found, at, m, k)
        m = k
    w = 0
    for q in range(m):
        if found[q] > 0:
            indices[w] = at[q]
            values[w] = found[q]
            w += 1
    for q in range(w, k):
        indices[q] = 0
        values[q] = 0


@loops
def count_over(scores: Array, threshold: Array, counts: Array) -> None:
    """Write how many scores of each row are over their latent's threshold.

    Args:
        scores: (rows, n).
        threshold: (n,).
        counts: (rows,) int64, written.
    """
    rows, n = scores.shape
    for task in prange(TASKS):
        low, high = span(task, rows)
        for r in range(low, high):
            count = 0
            for j in range(n):
                count += np.int64(scores[r, j] > threshold[j])
            counts[r] = count


@loops
def take_over(scores: Array, threshold: Array, offsets: Array, indices: Array, values: Array) -> None:
    """Write the scores over their latent's threshold, latents ascending, row r from offsets[r] on.

    Args:
        scores: (rows, n).
        threshold: (n,).
        offsets: (rows + 1,) int64, from `count_over`.
        indices: (pairs,) int64, written.
        values: (pairs,), written.
    """
    rows, n = scores.shape
    for task in prange(TASKS):
        low, high = span(task, rows)
        for r in range(low, high):
            at = offsets[r]
            for begin in range(0, n, LANES):
                end = min(n, begin + LANES)
                count = np.int32(0)
                for q in range(begin, end):
                    count += np.int32(scores[r, q] > threshold[q])
                if count > 0:
                    for q in range(begin, end):
                        if scores[r, q] > threshold[q]:
                            indices[at] = q
                            values[at] = scores[r, q]
                            at += 1
