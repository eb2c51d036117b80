"""Our subset of Zarr v3: rows into chunk files, chunk files into rows, and their metadata, which zarr writes.

A chunk file is its rows in C order, little-endian, padded with the fill value to the full chunk, and the crc32c of
all that in the last four bytes (Zarr v3 core, "regular grid"; codecs `bytes` and `crc32c`). So it memory-maps as an
array, and every Zarr reader notices a flipped bit. The exact rows of an int8 store vary in number, so `exact` holds one
byte string a row group: the registered data type `bytes` with the codec `vlen-bytes` (item count 1 and length, uint32
each, before the bytes), which zarr and zarrs read.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import google_crc32c
import ml_dtypes  # noqa: F401 - makes bfloat16 a dtype of numpy
import numpy as np
import numpy.typing as npt

from actstore.digests import canonical_json, parse_json, sha256_pieces
from actstore.errors import FormatError
from actstore.int8 import exact_dtype, parse_exact
from actstore.key import StoreKey
from actstore.layout import GROUP_METADATA, arrays_of, metadata_name
from actstore.manifest import Chunk
from actstore.stats import Moments

CRC_BYTES = 4
EXACT_HEADER = 8  # bytes of `exact` before its rows
UNUSED_CODE = -128  # fill value of int8 codes, which end at -127
Array = npt.NDArray[Any]


def _kind(array: str, dtype: str) -> tuple[str, int | str]:
    """Return an array's registered Zarr data type and its fill value."""
    if array == "acts":
        return dtype, UNUSED_CODE if dtype == "int8" else "NaN"
    return {"scale": ("float32", "NaN"), "columns": ("float32", "NaN"), "exact": ("bytes", "")}.get(array, ("int32", -1))


def numpy_dtype(array: str, dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of one of the store's arrays as it lies in the file; `dtype` is that of `acts`.

    Example:
        >>> str(numpy_dtype("acts", "float16")), str(numpy_dtype("tokens", "float16")), str(numpy_dtype("scale", "int8"))
        ('float16', 'int32', 'float32')
    """
    name, _ = _kind(array, dtype)
    return np.dtype("uint8" if name == "bytes" else name)


def row_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype in which activations of a stored dtype are gathered and read: float32 for int8.

    Example:
        >>> str(row_dtype("int8")), str(row_dtype("bfloat16"))
        ('float32', 'bfloat16')
    """
    return numpy_dtype("acts", "float32" if dtype == "int8" else dtype)


def array_shape(array: str, rows: int, group_rows: int, d_model: int) -> tuple[int, ...]:
    """Return the shape of an array.

    Example:
        >>> [array_shape(a, 5000, 1024, 16) for a in ("acts", "tokens", "columns", "exact")]
        [(5000, 16), (5000,), (5, 2, 16), (5,)]
    """
    n_groups = -(-rows // group_rows)
    return {"acts": (rows, d_model), "columns": (n_groups, 2, d_model), "exact": (n_groups,)}.get(array, (rows,))


def chunk_shape(array: str, group_rows: int, d_model: int) -> tuple[int, ...]:
    """Return the shape of one chunk of an array.

    Example:
        >>> chunk_shape("acts", 1024, 16), chunk_shape("tokens", 1024, 16)
        ((1024, 16), (1024,))
    """
    return array_shape(array, group_rows, group_rows, d_model)


def chunk_bytes(array: str, group_rows: int, d_model: int, dtype: str) -> int:
    """Return the size of one chunk file of an array, crc32c included; of `exact` the smallest.

    Example:
        >>> chunk_bytes("tokens", 1024, 16, "float32"), chunk_bytes("acts", 1024, 16, "float16")
        (4100, 32772)
    """
    if array == "exact":
        return EXACT_HEADER + CRC_BYTES
    return math.prod(chunk_shape(array, group_rows, d_model)) * numpy_dtype(array, dtype).itemsize + CRC_BYTES


def size_problem(array: str, size: int, rows: int, group_rows: int, d_model: int, dtype: str) -> str:
    """Return what is wrong with the size of a chunk file of a row group of `rows` rows, or "".

    Example:
        >>> size_problem("tokens", 10, 1024, 1024, 16, "float32")
        'has 10 bytes, it must have 4100'
    """
    wanted = chunk_bytes(array, group_rows, d_model, dtype)
    if array != "exact":
        return "" if size == wanted else f"has {size} bytes, it must have {wanted}"
    each = exact_dtype(d_model).itemsize
    if size >= wanted and (size - wanted) % each == 0 and (size - wanted) // each <= rows:
        return ""
    return f"has {size} bytes, it must have {wanted} and {each} for each of at most {rows} exact rows"


def decode_chunk(array: str, data: mmap.mmap, rows: int, group_rows: int, d_model: int, dtype: str) -> Array:
    """Return the rows of a chunk file as a view of its bytes, padding left out.

    Args:
        array: which array.
        data: all bytes of the file, of the right size, its crc32c checked.
        rows: rows of the row group.
        group_rows, d_model, dtype: of the store.

    Raises: FormatError: the parts of an `exact` chunk disagree.
    """
    body = np.frombuffer(data, np.uint8)[:-CRC_BYTES]
    if array == "exact":
        header, payload = body[:EXACT_HEADER].view("<u4"), body[EXACT_HEADER:]
        if header.tolist() != [1, len(payload)]:
            raise FormatError(f"the header of an exact chunk is {header.tolist()}, its size implies {[1, len(payload)]}", "exact")
        return parse_exact(payload, d_model, rows)
    shape = chunk_shape(array, group_rows, d_model)
    whole: Array = body.view(numpy_dtype(array, dtype)).reshape(shape)
    return whole[: 1 if array == "columns" else rows]


def encode_exact(exact: Array) -> tuple[list[memoryview], Chunk]:
    """Return the buffers of a chunk file of `exact` and its digests.

    Args:
        exact: (m,) records of `exact_dtype`.

    Example:
        >>> buffers, digests = encode_exact(np.zeros(2, exact_dtype(16)))
        >>> sum(buffer.nbytes for buffer in buffers) == EXACT_HEADER + 2 * 68 + CRC_BYTES
        True
    """
    header = np.array([1, exact.nbytes], "<u4")
    return _digested([_readonly_bytes(header), _readonly_bytes(exact)])


def encode_chunk(rows: Array, group_rows: int) -> tuple[list[memoryview], Chunk]:
    """Return the buffers of a chunk file and its digests, without copying the rows.

    Args:
        rows: (n, …) one array's rows of a row group, 1 <= n <= group_rows; C-contiguous.
        group_rows: rows of a full chunk; missing ones are padded with NaN, -1 in int32 arrays, or UNUSED_CODE in int8.

    Example:
        >>> buffers, digests = encode_chunk(np.arange(3, dtype=np.int32), 1024)
        >>> sum(buffer.nbytes for buffer in buffers)
        4100
    """
    fill = {"i1": UNUSED_CODE, "i4": -1}.get(rows.dtype.str[1:], np.nan)
    padding = np.full((group_rows - len(rows), *rows.shape[1:]), fill, rows.dtype)
    return _digested([_readonly_bytes(a) for a in (rows, padding)])


def _digested(body: list[npt.NDArray[np.uint8]]) -> tuple[list[memoryview], Chunk]:
    crc = 0
    for part in body:
        crc = google_crc32c.extend(crc, part)
    buffers = [*(part.data for part in body), memoryview(crc.to_bytes(CRC_BYTES, "little"))]
    return buffers, Chunk(sha256=sha256_pieces(buffers), crc32c=crc)


def _readonly_bytes(rows: Array) -> npt.NDArray[np.uint8]:
    """View an array as bytes that google_crc32c accepts (it wants read-only memory). ml_dtypes has no buffer of its own."""
    view = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    view.flags.writeable = False
    return view


def array_metadata(rows: int, d_model: int, dtype: str, group_rows: int, attributes: dict[str, Any]) -> dict[str, bytes]:
    """Return the `zarr.json` files of a store by name, written by zarr from the documents they are checked against.

    Args:
        rows: rows in the store.
        d_model: width of a row.
        dtype: stored dtype of `acts`.
        group_rows: rows of a chunk.
        attributes: attributes of the group: key, content digest, statistics.

    Example:
        >>> [*array_metadata(5000, 16, "float32", 1024, {})][:2]
        ['zarr.json', 'acts/zarr.json']
    """
    import zarr
    from zarr.core.group import GroupMetadata
    from zarr.core.metadata.v3 import ArrayV3Metadata

    import actstore.bfloat16  # noqa: F401 - zarr knows the type once this is imported

    made: dict[str, Any] = {GROUP_METADATA: GroupMetadata(attributes=attributes, zarr_format=3)}
    for array in arrays_of(dtype):
        made[metadata_name(array)] = ArrayV3Metadata.from_dict(_array_document(array, rows, d_model, dtype, group_rows))
    prototype = zarr.core.buffer.default_buffer_prototype()
    files = {name: metadata.to_buffer_dict(prototype)[GROUP_METADATA].to_bytes() for name, metadata in made.items()}
    if dtype == "int8":  # zarr 3.1.6 reads the registered name `bytes`, and writes its own
        name = metadata_name("exact")
        files[name] = files[name].replace(b'"variable_length_bytes"', b'"bytes"')
    return files


def _array_document(array: str, rows: int, d_model: int, dtype: str, group_rows: int) -> dict[str, Any]:
    """Return one array's metadata. Source: Zarr v3 core specification, "Array metadata"."""
    name, fill = _kind(array, dtype)
    codec: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    if numpy_dtype(array, dtype).itemsize == 1:
        codec = {"name": "vlen-bytes", "configuration": {}} if name == "bytes" else {"name": "bytes"}
    return {
        "shape": list(array_shape(array, rows, group_rows, d_model)),
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape(array, group_rows, d_model))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": [codec, {"name": "crc32c"}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def check_array_metadata(array: str, data: bytes, rows: int, d_model: int, dtype: str, group_rows: int) -> None:
    """Refuse a `zarr.json` that says anything but what the manifest implies: no foreign codec or shape is ever opened.

    Raises: FormatError: naming the field.
    """
    _compare(metadata_name(array), data, _array_document(array, rows, d_model, dtype, group_rows))


def group_attributes(key: StoreKey, content_digest: str, moments: Moments) -> dict[str, Any]:
    """Return the attributes of a store's Zarr group, for people who open it with other tools."""
    about = {"key": key.model_dump(), "content_digest": content_digest}
    return {"actstore": {**about, "mean_norm": moments.mean_norm, "total_variance": moments.total_variance}}


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
