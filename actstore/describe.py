"""What a sealed store is, in numbers for people: size against float32, norms, outliers."""

from __future__ import annotations

import os
from typing import Any

from actstore.int8 import exact_dtype
from actstore.layout import arrays_of, chunk_name
from actstore.manifest import rows_per_group
from actstore.reader import Store
from actstore.stats import describe_norms
from actstore.zarr_array import chunk_bytes


def bytes_as_float32(store: Store) -> int:
    """Return the bytes that the chunk files of the same rows take in a float32 store, tokens and positions included."""
    group_rows = rows_per_group(store.d_model, "float32", store.rows)
    each = sum(chunk_bytes(a, group_rows, store.d_model, "float32") for a in arrays_of("float32"))
    return -(-store.rows // group_rows) * each


def exact_rows(store: Store) -> int | None:
    """Return how many rows an int8 store keeps in float32; None for another dtype."""
    if store.dtype != "int8":
        return None
    sizes = (os.lstat(store.path / chunk_name("exact", g)).st_size for g in range(len(store.manifest.groups)))
    empty = chunk_bytes("exact", 1, store.d_model, "int8")
    return sum((size - empty) // exact_dtype(store.d_model).itemsize for size in sizes)


def describe_store(store: Store) -> dict[str, Any]:
    """Return size and statistics of a store as JSON values; see `stats.describe_norms`."""
    moments = store.statistics
    as_float32 = bytes_as_float32(store)
    kept = exact_rows(store)
    statistics = {
        "mean_norm": moments.mean_norm,
        "total_variance": moments.total_variance,
        "norm_of_mean": float((moments.mean**2).sum() ** 0.5),
        "max_abs": float(moments.max_abs.max()),
        **describe_norms(moments),
        "non_finite": 0,  # a capture that meets one stops
    }
    return {
        "bytes": store.bytes,
        "bytes_float32": as_float32,
        "smaller": as_float32 / store.bytes,
        **({} if kept is None else {"exact_rows": kept}),
        "statistics": statistics,
    }
