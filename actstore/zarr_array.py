"""Our subset of Zarr v3: rows into chunk files, chunk files into rows, and the metadata that zarr writes for them.

A chunk file is its rows in C order, little-endian, padded with the fill value to the full chunk, and the crc32c of
all that in the last four bytes (Zarr v3 core, "regular grid"; codecs `bytes` and `crc32c`). So it memory-maps as an
array, and every Zarr reader notices a flipped bit.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, cast

import google_crc32c
import numpy as np
import numpy.typing as npt

from actstore.digests import canonical_json, parse_json
from actstore.errors import FormatError
from actstore.key import StoreKey
from actstore.layout import ARRAYS, GROUP_METADATA, metadata_name
from actstore.manifest import Chunk
from actstore.stats import Moments

CRC_BYTES = 4
Array = npt.NDArray[Any]


def numpy_dtype(array: str, dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of one of the store's arrays; `dtype` is that of `acts`, the others are int32.

    Example:
        >>> str(numpy_dtype("acts", "float16")), str(numpy_dtype("tokens", "float16"))
        ('float16', 'int32')
    """
    if array != "acts":
        return np.dtype("<i4")
    if dtype == "bfloat16":
        import ml_dtypes

        return cast(np.dtype[Any], np.dtype(ml_dtypes.bfloat16))
    return np.dtype(dtype)


def chunk_shape(array: str, group_rows: int, d_model: int) -> tuple[int, ...]:
    """Return the shape of one chunk of an array.

    Example:
        >>> chunk_shape("acts", 1024, 16), chunk_shape("tokens", 1024, 16)
        ((1024, 16), (1024,))
    """
    return (group_rows, d_model) if array == "acts" else (group_rows,)


def chunk_bytes(array: str, group_rows: int, d_model: int, dtype: str) -> int:
    """Return the size of one chunk file of an array, crc32c included."""
    return math.prod(chunk_shape(array, group_rows, d_model)) * numpy_dtype(array, dtype).itemsize + CRC_BYTES


def encode_chunk(rows: Array, group_rows: int) -> tuple[list[memoryview], Chunk]:
    """Return the buffers of a chunk file and its digests, without copying the rows.

    Args:
        rows: (n, …) one array's rows of a row group, 1 <= n <= group_rows; C-contiguous.
        group_rows: rows of a full chunk; missing ones are padded with NaN, or -1 in integer arrays.
    """
    fill = -1 if np.issubdtype(rows.dtype, np.integer) else np.nan
    padding = np.full((group_rows - len(rows), *rows.shape[1:]), fill, rows.dtype)
    body = [_readonly_bytes(a) for a in (rows, padding)]
    crc = 0
    for part in body:
        crc = google_crc32c.extend(crc, part)
    buffers = [*(part.data for part in body), memoryview(crc.to_bytes(CRC_BYTES, "little"))]
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return buffers, Chunk(sha256=digest.hexdigest(), crc32c=crc)


def _readonly_bytes(rows: Array) -> npt.NDArray[np.uint8]:
    """View an array as bytes that google_crc32c accepts (it wants read-only memory). ml_dtypes has no buffer of its own."""
    view = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    view.flags.writeable = False
    return view


def array_metadata(rows: int, d_model: int, dtype: str, group_rows: int, attributes: dict[str, Any]) -> dict[str, bytes]:
    """Return the `zarr.json` files of a store by name, as zarr itself writes them.

    Args:
        rows: rows in the store.
        d_model: width of a row.
        dtype: stored dtype of `acts`.
        group_rows: rows of a chunk.
        attributes: attributes of the group: key, content digest, statistics.
    """
    import zarr
    from zarr.codecs import BytesCodec
    from zarr.codecs.crc32c_ import Crc32cCodec

    from actstore.bfloat16 import BFloat16

    memory: dict[str, Any] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(memory), attributes=attributes, zarr_format=3)
    for array in ARRAYS:
        group.create_array(
            array,
            shape=(rows, d_model) if array == "acts" else (rows,),
            chunks=chunk_shape(array, group_rows, d_model),
            # zarr finds registered types by name when it reads, but not by numpy dtype when it writes
            dtype=BFloat16() if array == "acts" and dtype == "bfloat16" else numpy_dtype(array, dtype),
            fill_value=float("nan") if array == "acts" else -1,
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            filters=None,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
    files = {name: memory[name].to_bytes() for name in (GROUP_METADATA, *map(metadata_name, ARRAYS))}
    for array in ARRAYS:
        check_array_metadata(array, files[metadata_name(array)], rows, d_model, dtype, group_rows)
    return files


def check_array_metadata(array: str, data: bytes, rows: int, d_model: int, dtype: str, group_rows: int) -> None:
    """Refuse a `zarr.json` that says anything but what the manifest implies: no foreign codec or shape is ever opened.

    Raises: FormatError: naming the field.
    """
    shape = [rows, d_model] if array == "acts" else [rows]
    expected: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype if array == "acts" else "int32",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(chunk_shape(array, group_rows, d_model))},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if array == "acts" else -1,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "attributes": {},
        "storage_transformers": [],
    }
    _compare(metadata_name(array), data, expected)


def group_attributes(key: StoreKey, content_digest: str, moments: Moments) -> dict[str, Any]:
    """Return the attributes of a store's Zarr group, for people who open it with other tools."""
    about = {
        "key": key.model_dump(),
        "content_digest": content_digest,
        "mean_norm": moments.mean_norm,
        "total_variance": moments.total_variance,
    }
    return {"actstore": about}


def check_group_metadata(data: bytes, attributes: dict[str, Any]) -> None:
    """Refuse a group's `zarr.json` with other attributes, or with metadata of arrays inside (consolidated).

    Raises: FormatError: naming the field.
    """
    _compare(GROUP_METADATA, data, {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _compare(name: str, data: bytes, expected: dict[str, Any]) -> None:
    found = parse_json(data, name)
    if not isinstance(found, dict):
        raise FormatError(f"{name} must hold an object", where=name)
    for field in sorted(expected.keys() | found.keys()):
        have, want = found.get(field), expected.get(field)
        if field not in expected or canonical_json(have) != canonical_json(want):  # as JSON: 1, 1.0 and true differ
            raise FormatError(f"{name}: field {field} is {str(have)[:80]}, the manifest implies {str(want)[:80]}", where=name)
