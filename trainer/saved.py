"""What a run's files must look like: each JSON file a strict record, each safetensors file exactly the tensors expected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from actstore.digests import canonical_json, parse_json, sha256_bytes
from actstore.errors import FormatError
from actstore.files import read_bounded
from actstore.key import Digest, Record, StoreKey, Strict, parse_record
from actstore.limits import MAX_D_MODEL, MAX_HEADER_BYTES, MAX_METRICS_BYTES, MAX_ROWS, MAX_WORKERS

Count = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
DTYPES = {
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip


class OtherStore(Strict):
    """A row-aligned store of a crosscoder ("input") or transcoder ("target"), besides the first."""

    role: Literal["input", "target"]
    store: Digest
    content_digest: Digest
    d_model: Annotated[int, Field(ge=1, le=MAX_D_MODEL)]
    key: StoreKey


class About(Strict):
    """`config.json`: what a run is. `config` holds the fields of SaeConfig; its digest names the run's folder."""

    format: Literal[1]
    config: dict[str, Any]
    store: Digest
    content_digest: Digest
    d_model: Annotated[int, Field(ge=1, le=MAX_D_MODEL)]
    key: StoreKey
    model: Annotated[str, Field(max_length=4096)]
    others: Annotated[list[OtherStore], Field(max_length=64)] = []


class Density(Strict):
    """A histogram of how often latents are active."""

    log10_edges: list[float] = Field(fail_fast=True)
    latents: list[Count] = Field(fail_fast=True)
    never: Count


class Result(Strict):
    """`result.json`: the seal of a run, with its final numbers."""

    format: Literal[1]
    rows_seen: Count
    train: dict[str, float | None]
    held_out: dict[str, float | Density | None]
    dead_fraction: float | None
    dead_window_rows: Count
    sae_sha256: Digest


class Cosines(Strict):
    """Each latent's largest cosine to another latent of its SAE: a histogram, and the median."""

    edges: list[float] = Field(fail_fast=True)
    latents: list[Count] = Field(fail_fast=True)
    median: float


class Evaluation(Strict):
    """`evaluations/<digest>.json`: what `trainer evaluate` found on the rows that the digest stands for.

    `content_digest` is that of all rows of the stores measured, `sae_sha256` that of the SAE; `rows_measured` rows were
    measured, of held-out documents of the run's own store if `held_out`, else the first ones.
    """

    format: Literal[1]
    store: Digest
    content_digest: Digest
    held_out: bool
    rows_measured: Count
    sae_sha256: Digest
    numbers: dict[str, int | float | Density | None]
    max_cosine: Cosines
    model_loss: dict[str, int | float | None] | None


class Commit(Strict):
    """`checkpoints/<step>.json`: the commit of a checkpoint; `metrics_bytes` is the length of metrics.jsonl then.

    `sha256` is the digest of `<step>.safetensors`; where the latents were spread over ranks, `shards` are those of
    `<step>.1.safetensors` and so on.
    """

    step: Count
    sha256: Digest
    metrics_bytes: Count
    scalars: dict[str, int | float]  # a count stays an integer, so that a resumed run writes the same bytes
    shards: Annotated[list[Digest], Field(max_length=MAX_WORKERS - 1)] = []


def read_record(kind: type[Record], root: Path, name: str, limit_bytes: int) -> Record:
    """Return one of a run's JSON files as its record. Raises: FileNotFoundError. FormatError: not what it must be."""
    try:
        return parse_record(kind, read_bounded(root, name, limit_bytes), name)
    except FormatError as error:
        raise FormatError(error.what, str(root / name), error.do) from error


def read_metrics(root: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl; a line cut by a crash is left out. Raises: FormatError."""
    try:
        lines = read_bounded(root, "metrics.jsonl", MAX_METRICS_BYTES).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = [parse_json(line, "metrics.jsonl") for line in lines]
    for line in found:
        if not isinstance(line, dict) or any(type(line.get(name)) not in (int, float) for name in ("rows", "loss", "fvu")):
            raise FormatError("each line of metrics.jsonl must have the numbers rows, loss and fvu", where=str(root))
    return found


def read_tensors(root: Path, name: str, expected: Shapes, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly the expected tensors.

    Args:
        root: the run's folder.
        name: the file below it.
        expected: shape and dtype of each tensor, from the run's config.
        sha256: the file's digest, as the record that commits it says.

    Raises: FileNotFoundError. FormatError: too large for them, another digest, other names, shapes or dtypes.
    """
    wanted = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in expected.values())
    data = read_bounded(root, name, wanted + MAX_HEADER_BYTES)
    if sha256_bytes(data) != sha256:
        raise FormatError("the file's digest is not the recorded one", where=str(root / name))
    return parse_tensors(data, expected, root / name)


def tensor_pieces(tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """Return a safetensors file of tensors on the CPU as pieces, none of them a copy: a large checkpoint needs no second memory.

    Example:
        >>> data = b"".join(tensor_pieces({"a": torch.tensor([1.0, 2.0])}))
        >>> load_tensors(data)["a"].tolist()
        [1.0, 2.0]
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    data = [memoryview(t.detach().contiguous().numpy()).cast("B") for t in tensors.values() if t.numel()]  # type: ignore[arg-type]
    return [len(text).to_bytes(8, "little"), text, *data]


def parse_tensors(data: bytes, expected: Shapes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file's bytes. Raises: FormatError: not exactly those expected."""
    found = _header(data, path)
    wanted = {name: (list(shape), dtype) for name, (shape, dtype) in expected.items()}
    if found != wanted:
        different = sorted(ascii(name)[:80] for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise FormatError(f"tensors {', '.join(different[:5])} are not as the config says", where=str(path))
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
    except SafetensorError as error:
        raise FormatError(f"not a safetensors file: {error}", where=str(path)) from error
    return tensors


def parse_floats(data: bytes, shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file's bytes, which may be of any float dtype, as float32.

    Raises: FormatError: not exactly tensors of these names and shapes.
    """
    found = _header(data, path)
    dtypes = {name: dtype for name, (_, dtype) in found.items() if dtype is not None and dtype.is_floating_point}
    expected = {name: (shape, dtypes.get(name, torch.float32)) for name, shape in shapes.items()}
    return {name: tensor.float() for name, tensor in parse_tensors(data, expected, path).items()}


def _header(data: bytes, path: Path) -> dict[str, tuple[Any, torch.dtype | None]]:
    """Return name, shape and dtype of a safetensors file's tensors, before anything is allocated for them.

    Source: https://github.com/huggingface/safetensors, "Format": 8 bytes length, JSON header, tensors without gaps.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise FormatError(f"not a safetensors file: a header of {length} bytes", where=str(path))
    header = parse_json(data[8 : 8 + length], f"the header of {path.name}")
    if not isinstance(header, dict):
        raise FormatError("not a safetensors file: its header is no object", where=str(path))
    header.pop("__metadata__", None)
    if any(not isinstance(about, dict) for about in header.values()):
        raise FormatError("not a safetensors file: a tensor in its header is no object", where=str(path))
    return {name: (about.get("shape"), DTYPES.get(str(about.get("dtype")))) for name, about in header.items()}
