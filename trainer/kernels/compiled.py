"""The compiled loops of the CPU kernel: everything of a step but its one dense product. Numba compiles and caches them.

All matrices are row-major with a latent's, or a batch row's, vector in one row, so each access to an active latent is a
contiguous read. Work is cut into tasks that do not depend on the number of threads, and each sum is taken in one task
in a fixed order: the same input gives the same bits however many threads there are.

Method and measurements: ../shared/research/kernels.md, section 3.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch  # before the first compiled loop runs: both then share one thread pool
from numba import njit, prange
from numba.core.compiler_lock import global_compiler_lock

Array = npt.NDArray[Any]
# Numba keeps compiled code beside the source, else in the home folder; on a read-only machine it compiles in each process.
CACHED = any(os.access(place, os.W_OK) for place in (Path(__file__).parent, Path.home())) or "NUMBA_CACHE_DIR" in os.environ
# Sums may be reordered into SIMD lanes; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {
    "cache": CACHED,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}
numba.config.THREADING_LAYER = "omp"  # torch's own pool: two would spin against each other
TASKS = 64
COMPILE_S = 120  # a compilation takes 1 to 5 s
LANES = 64  # entries compared at once, before any of them is looked at


def loops(function: Callable[..., None]) -> Callable[..., None]:
    """Compile parallel loops, run by as many threads as torch has; what runs is what the cache holds, also on the first use.

    Numba 0.68 runs other machine code in the process that compiles parallel loops than it reads back from its cache: sums
    were taken in another order, and a fit begun on a fresh machine did not go on bit for bit. So a child compiles.
    """
    compiled, seen = njit(parallel=True, **OPTIONS)(function), set()

    @functools.wraps(function)
    def call(*arguments: Any) -> None:
        _use_torch_threads()
        kinds = tuple(map(_kind, arguments))
        if kinds not in seen:
            types = tuple(map(numba.typeof, arguments))
            if CACHED and hasattr(os, "fork") and not _is_in_cache(compiled, types):
                _compile_in_a_child(compiled, types)
            compiled.compile(types)
            seen.add(kinds)
        compiled(*arguments)

    return call


def _kind(argument: Any) -> Any:
    """Return what decides an argument's type in Numba; `numba.typeof` takes 25 times as long, a millisecond of each step."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.char, argument.ndim, argument.flags.num
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else type(argument)


def _is_in_cache(compiled: Any, types: tuple[Any, ...]) -> bool:
    """Return whether the index of Numba's cache has machine code for these types; False where its inside is another one."""
    compiled.targetctx.refresh()  # here, not in the child and once more in its parent
    with contextlib.suppress(AttributeError):
        return compiled._cache._index_key(types, compiled.targetctx.codegen()) in compiled._cache._cache_file._load_index()
    return False


def _compile_in_a_child(compiled: Any, types: tuple[Any, ...]) -> None:
    """Fill the cache. Whatever goes wrong in the child, the caller compiles then itself."""
    with global_compiler_lock, contextlib.suppress(OSError):  # no other thread is inside the compiler when it is copied
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(COMPILE_S)
                compiled.compile(types)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def _use_torch_threads() -> None:
    """Let compiled loops use as many threads as torch does; the setting is the calling thread's."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # numba's start sets the shared pool to its own number, once
        torch.set_num_threads(threads)


@njit(**OPTIONS)
def span(task: int, n: int) -> tuple[int, int]:
    """Return the part [lo, hi) of n items that a task has."""
    size = (n + TASKS - 1) // TASKS
    return min(n, task * size), min(n, (task + 1) * size)


def cache() -> tuple[Path, int]:
    """Return the folder in which numba keeps compiled loops of these files, and how many it holds."""
    folder = Path(getattr(getattr(span, "_cache", None), "cache_path", "") or "")
    return folder, sum(file.suffix == ".nbc" for file in folder.glob("compiled*")) if folder.is_dir() else 0


@njit(**OPTIONS)
def mix(x: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele, Lea, Flood 2014); wraps by design."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@loops
def decode_error(
    target: Array, W_dec: Array, b_dec: Array, indices: Array, values: Array, offsets: Array, residual: Array, products: Array,
    squared: Array,
) -> None:  # fmt: skip
    """Write each row's residual, its square, and its product with each active latent: one gather serves all three.

    Args:
        target: (rows, d_out).
        W_dec: (n_latents, d_out).
        b_dec: (d_out,).
        indices: (pairs,) int64.
        values: (pairs,).
        offsets: (rows + 1,) int64.
        residual: (rows, d_out), written: target - code W_dec - b_dec.
        products: (pairs,), written: residual · W_dec[latent].
        squared: (rows,), written: |residual|².
    """
    rows, d = target.shape
    for task in prange(TASKS):
        low, high = span(task, rows)
        for r in range(low, high):
            e, x = residual[r], target[r]
            for c in range(d):
                e[c] = b_dec[c] - x[c]
            _add_rows(W_dec, indices, values, offsets[r], offsets[r + 1], e)
            total = target.dtype.type(0)
            for c in range(d):
                e[c] = -e[c]
                total += e[c] * e[c]
            squared[r] = total
            row_products(W_dec, indices, offsets[r], offsets[r + 1], e, products)


@njit(**OPTIONS)
def _add_rows(source: Array, rows: Array, factors: Array, begin: int, end: int, out: Array) -> None:
    """out += sum of factors[p] source[rows[p]] over p in [begin, end); four rows at a time share one pass over out."""
    d, p = len(out), begin
    while p + 4 <= end:
        s0, s1, s2, s3 = source[rows[p]], source[rows[p + 1]], source[rows[p + 2]], source[rows[p + 3]]
        f0, f1, f2, f3 = factors[p], factors[p + 1], factors[p + 2], factors[p + 3]
        for c in range(d):
            out[c] += f0 * s0[c] + f1 * s1[c] + f2 * s2[c] + f3 * s3[c]
        p += 4
    while p < end:
        s0, f0 = source[rows[p]], factors[p]
        for c in range(d):
            out[c] += f0 * s0[c]
        p += 1


@njit(**OPTIONS)
def row_products(source: Array, rows: Array, begin: int, end: int, x: Array, out: Array) -> None:
    """out[p] = x · source[rows[p]] for p in [begin, end), four at a time."""
    d, p = len(x), begin
    while p + 4 <= end:
        s0, s1, s2, s3 = source[rows[p]], source[rows[p + 1]], source[rows[p + 2]], source[rows[p + 3]]
        a0 = a1 = a2 = a3 = x.dtype.type(0)
        for c in range(d):
            a0 += x[c] * s0[c]
            a1 += x[c] * s1[c]
            a2 += x[c] * s2[c]
            a3 += x[c] * s3[c]
        out[p], out[p + 1], out[p + 2], out[p + 3] = a0, a1, a2, a3
        p += 4
    while p < end:
        s0, a0 = source[rows[p]], x.dtype.type(0)
        for c in range(d):
            a0 += x[c] * s0[c]
        out[p] = a0
        p += 1


@njit(**OPTIONS)
def by_latent(indices: Array, offsets: Array, factors: Array, begins: Array, rows: Array, sorted_factors: Array) -> None:
    """Sort pairs by latent (counting sort, rows stay ascending), leaving out those of factor 0.

    Args:
        indices: (pairs,) int64.
        offsets: (rows + 1,) int64.
        factors: (pairs,).
        begins: (n_latents + 1,) int64, written: where each latent's pairs begin.
        rows: (pairs,) int64, written: the row of each sorted pair.
        sorted_factors: (pairs,), written.
    """
    n = len(begins) - 1
    begins[:] = 0
    for p in range(len(indices)):
        begins[indices[p] + 1] += np.int64(factors[p] != 0)
    for j in range(n):
        begins[j + 1] += begins[j]
    for r in range(len(offsets) - 1):
        for p in range(offsets[r], offsets[r + 1]):
            if factors[p] != 0:
                at = begins[indices[p]]
                rows[at] = r
                sorted_factors[at] = factors[p]
                begins[indices[p]] = at + 1
    for j in range(n, 0, -1):
        begins[j] = begins[j - 1]
    begins[0] = 0


@loops
def weight_gradient(
    begins: Array, rows: Array, factors: Array, source: Array, scale: float, add: bool, out: Array, sums: Array
) -> None:
    """Write for each latent scale · sum of factor · source[row] over its pairs, or add it to what is there.

    Args:
        begins: (n_latents + 1,) int64, of `by_latent`, like `rows` and `factors`.
        rows: (pairs,) int64.
        factors: (pairs,).
        source: (rows, d).
        scale: of the result.
        add: keep what `out` holds.
        out: (n_latents, d), written.
        sums: (n_latents,), written: scale · sum of the latent's factors.
    """
    n, d = out.shape
    for task in prange(TASKS):
        for j in range(task, n, TASKS):  # in turn, because often used latents lie side by side
            row = out[j]
            total = source.dtype.type(0)
            for p in range(begins[j], begins[j + 1]):
                factors[p] *= scale
                total += factors[p]
            sums[j] = total
            if not add:
                for c in range(d):
                    row[c] = 0
            _add_rows(source, rows, factors, begins[j], begins[j + 1], row)


@loops
def project_rows(gradient: Array, weights: Array, partial: Array) -> None:
    """Remove each gradient row's part along its unit weight row; write partial sums of the squares of what is left.

    Args:
        gradient: (n, d), changed.
        weights: (n, d), rows of norm 1.
        partial: (TASKS,) float64, written.
    """
    n, d = gradient.shape
    for task in prange(TASKS):
        low, high = span(task, n)
        total = 0.0
        for j in range(low, high):
            g, w = gradient[j], weights[j]
            along = g.dtype.type(0)
            for c in range(d):
                along += g[c] * w[c]
            squares = g.dtype.type(0)
            for c in range(d):
                g[c] -= along * w[c]
                squares += g[c] * g[c]
            total += squares
        partial[task] = total


@loops
def normalize_rows(rows: Array, tiny: float) -> None:
    """Scale each row of (n, d) to Euclidean norm 1, or by 1 / tiny where the norm is below it."""
    n, d = rows.shape
    for task in prange(TASKS):
        low, high = span(task, n)
        for j in range(low, high):
            row = rows[j]
            squares = row.dtype.type(0)
            for c in range(d):
                squares += row[c] * row[c]
            factor = row.dtype.type(1) / max(np.sqrt(squares), row.dtype.type(tiny))
            for c in range(d):
                row[c] *= factor
