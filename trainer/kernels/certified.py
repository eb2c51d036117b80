"""Top-k of the float32 scores from a bfloat16 product: candidates that provably hold it, scored again in float32.

A score s is within e + |s| 2^-7 of the true one (`certified_bound`). So with t the k-th largest s of a row, each of its k
largest true scores has s >= t (1 - 2^-6) - 2 e. All such s are scored again in float32. Where this bound is not positive,
or more are found than there is room for, the row's scores are computed in float32 altogether.

Measured: 60 to 68 candidates at k 32, no row of real use left over (../shared/research/kernels.md, section 3).
"""

from __future__ import annotations

import numpy as np
from numba import prange

from trainer.kernels.compiled import LANES, TASKS, Array, loops, row_products, span
from trainer.kernels.compiled_topk import group_bound, groups_for, select, take_best

RELATIVE = np.float32(1 - 2**-6)


@loops
def round_rows(rows: Array, bits: Array, rounded: Array, norms: Array, errors: Array) -> None:
    """Round float32 rows to the nearest bfloat16, ties to even; write norms of the rounded rows and of what was taken.

    Args:
        rows: (n, d) float32.
        bits: the same memory as uint32.
        rounded: (n, d) uint16, written: the bits of the bfloat16 numbers.
        norms: (n,) float32, written.
        errors: (n,) float32, written.
    """
    n, d = rows.shape
    for task in prange(TASKS):
        kept = np.empty(d, np.uint32)
        as_float = kept.view(np.float32)
        low, high = span(task, n)
        for j in range(low, high):
            source, out = bits[j], rounded[j]
            for c in range(d):
                u = source[c]
                u = u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
                out[c] = np.uint16(u >> np.uint32(16))
                kept[c] = u & np.uint32(0xFFFF0000)
            square = taken = np.float32(0)
            row = rows[j]
            for c in range(d):
                square += as_float[c] * as_float[c]
                taken += (row[c] - as_float[c]) * (row[c] - as_float[c])
            norms[j] = np.sqrt(square)
            errors[j] = np.sqrt(taken)


@loops
def candidates(scores: Array, k: int, slack: Array, indices: Array, counts: Array) -> None:
    """Write the latents of each row that may be among its k largest true scores.

    Args:
        scores: (rows, n) bits of bfloat16 scores as int16: ordered like the numbers where positive.
        k: 1 to n.
        slack: (rows,) float32, twice the error bound.
        indices: (rows, capacity) int32, written.
        counts: (rows,) int64, written; -1 where nothing is certified.
    """
    rows, n = scores.shape
    capacity = indices.shape[1]
    width = groups_for(k)
    for task in prange(TASKS):
        maxima, scratch = np.empty(width, np.int16), np.empty(width, np.int32)
        found, at = np.empty(2 * capacity + 2 * LANES, np.float32), np.empty(2 * capacity + 2 * LANES, np.int32)
        word = np.empty(1, np.uint32)
        number = word.view(np.float32)
        low, high = span(task, rows)
        for r in range(low, high):
            row = scores[r]
            bound = np.int16(1)
            if n >= 2 * width:
                group = group_bound(row, n // width, maxima, scratch, k)
                word[0] = np.uint32(np.uint16(max(group, 0))) << np.uint32(16)
                number[0] = number[0] * RELATIVE - slack[r]
                if number[0] > 0:
                    bound = max(bound, np.int16(word[0] >> np.uint32(16)))  # rounded down
            m = 0
            whole = n // LANES * LANES
            for begin in range(0, whole, LANES):
                block = row[begin : begin + LANES]
                count = np.int32(0)
                for q in range(LANES):
                    count += np.int32(block[q] >= bound)
                if count > 0 and m <= 2 * capacity:
                    for q in range(LANES):  # append without a branch
                        word[0] = np.uint32(np.uint16(block[q])) << np.uint32(16)
                        found[m] = number[0]
                        at[m] = begin + q
                        m += np.int64(block[q] >= bound)
            for j in range(whole, n):
                word[0] = np.uint32(np.uint16(row[j])) << np.uint32(16)
                found[m] = number[0]
                at[m] = j
                m += np.int64(row[j] >= bound)
            counts[r] = -1
            if k <= m <= 2 * capacity:
                threshold = select(found, at, m, k) * RELATIVE - slack[r]
                kept = 0
                for q in range(m):
                    if found[q] >= threshold:
                        if kept < capacity:
                            indices[r, kept] = at[q]
                        kept += 1
                if threshold > 0 and kept <= capacity:
                    counts[r] = kept


@loops
def score_again(
    x: Array, W_enc: Array, b_enc: Array, k: int, chosen: Array, counts: Array, indices: Array, values: Array
) -> None:
    """Write the k largest positive float32 scores among each row's candidates; rows that have none stay as they are.

    Args:
        x: (rows, d) centred rows.
        W_enc: (n_latents, d).
        b_enc: (n_latents,).
        k: 1 to n_latents.
        chosen: (rows, capacity) int32, of `candidates`, like `counts`.
        counts: (rows,) int64.
        indices: (rows, k) int64, written.
        values: (rows, k), written.
    """
    rows = len(x)
    for task in prange(TASKS):
        scores, at = np.empty(chosen.shape[1], x.dtype), np.empty(chosen.shape[1], np.int32)
        low, high = span(task, rows)
        for r in range(low, high):
            m = counts[r]
            if m >= 0:
                row_products(W_enc, chosen[r], 0, m, x[r], scores)
                for q in range(m):
                    at[q] = chosen[r, q]
                    scores[q] += b_enc[at[q]]
                take_best(scores, at, m, k, indices[r], values[r])
