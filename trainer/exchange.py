"""What the formats share: an SAE as others write it down, and reading what others wrote, of which nothing is trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from actstore import durable
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import FormatError, UsageError
from actstore.files import read_bounded
from actstore.key import Strict, parse_record
from actstore.limits import MAX_CONFIG_BYTES, MAX_D_MODEL, MAX_HEADER_BYTES
from trainer.checkpoint import Run, new_sae
from trainer.config import MAX_LATENTS, SaeConfig
from trainer.sae import SparseAutoencoder, Widths, tensors_of
from trainer.saved import parse_floats

HOLDOUT = 0.02  # as `trainer fit`: an imported SAE is measured on the rows that ours are measured on
TRAINING_ONLY = {"weight", "mean_l0", "scale"}  # buffers that no code depends on
Width = Annotated[int, Field(ge=1, le=MAX_D_MODEL)]
Latents = Annotated[int, Field(ge=1, le=MAX_LATENTS)]
Shapes = Mapping[str, tuple[int, ...]]


class Foreign(Strict):
    """A record of somebody else's file: its fields have exactly their types; fields that mean nothing to us may be there."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


Record = TypeVar("Record", bound=Foreign)


class Parts(NamedTuple):
    """What an importer returns.

    Args:
        arch: our architecture with the same code.
        k: active latents a row; where the format does not say, 1.
        tensors: by our names and in our shapes, float32; `threshold` (n_latents,) also where `arch` keeps its logarithm.
        files: the bytes read, whose digest names the SAE.
        transcoder: it reconstructs other rows than it reads.
    """

    arch: str
    k: int
    tensors: dict[str, Tensor]
    files: Sequence[bytes]
    transcoder: bool = False


def build_sae(parts: Parts, name: str, where: str) -> SparseAutoencoder:
    """Return the SAE that an importer read; its `config.imported` is "name:digest".

    Raises: FormatError: k is not from 1 to n_latents, or a value is NaN or infinite.
    """
    tensors = dict(parts.tensors)
    n_latents, d_in = tensors["W_enc"].shape
    if not 1 <= parts.k <= n_latents:
        raise FormatError(f"k is {parts.k}; allowed: 1 to the {n_latents} latents", where)
    for tensor_name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"tensor {tensor_name} has values that are NaN or infinite as float32", where)
    if "threshold" in tensors:  # of ReLU's output, so that one below 0 does what 0 does
        tensors["threshold"] = tensors["threshold"].clamp_min(0)
        if parts.arch == "jumprelu":
            tensors["log_threshold"] = tensors.pop("threshold").log()
    widths = Widths((d_in,), (tensors["W_dec"].shape[1],) if parts.transcoder else None)
    if parts.transcoder:
        tensors["b_in"] = torch.zeros(d_in)
    origin = sha256_bytes(canonical_json([sha256_bytes(data) for data in parts.files]))
    sae = new_sae(_config(parts.arch, n_latents, parts.k, "W_skip" in tensors, f"{name}:{origin}"), widths)
    wanted = tensors_of(sae)
    assert wanted.keys() - tensors.keys() <= TRAINING_ONLY and tensors.keys() <= wanted.keys()
    with torch.no_grad():
        for tensor_name, tensor in tensors.items():
            wanted[tensor_name].copy_(tensor)
    return sae.eval()


def _config(arch: str, n_latents: int, k: int, skip: bool, imported: str) -> SaeConfig:
    """Return the configuration of an imported SAE; fields of the training have the least value allowed."""
    return SaeConfig(
        arch=arch, n_latents=n_latents, k=k, lr=1.0, seed=0, rows=1, batch_size=1, holdout=HOLDOUT, skip_positions=0,
        exclude_special=False, shuffle="window", shuffle_seed=0, aux_k=1, aux_alpha=0.0, dead_after_rows=1, warmup_fraction=0.0,
        decay_fraction=0.0, dead="none", skip=skip, imported=imported,
    )  # fmt: skip


def read_config(folder: Path, name: str, kind: type[Record]) -> tuple[Record, bytes]:
    """Return a folder's JSON file as its record, and its bytes. Raises: FormatError: missing, or not what it must be."""
    data = read_whole(folder, name, MAX_CONFIG_BYTES)
    try:
        return parse_record(kind, data, name), data
    except FormatError as error:
        raise FormatError(error.what, str(folder / name), error.do) from error


def read_weights(folder: Path, name: str, shapes: Shapes) -> tuple[dict[str, Tensor], bytes]:
    """Return a folder's safetensors file as float32 tensors, and its bytes.

    Raises: FormatError: missing, larger than the config says, or not exactly float tensors of these names and shapes.
    """
    data = read_whole(folder, name, most_bytes(shapes) + MAX_HEADER_BYTES)
    return parse_floats(data, dict(shapes), folder / name), data


def read_whole(folder: Path, name: str, limit_bytes: int) -> bytes:
    """Return a file of a folder. Raises: FormatError: missing, a link, over the limit, or too large for the memory."""
    try:
        return read_bounded(folder, name, limit_bytes)
    except FileNotFoundError as error:
        do = "name the folder in which that file lies, and --format as what wrote it"
        raise FormatError(f"the folder has no {name}", str(folder), do) from error
    except MemoryError as error:
        raise FormatError("the file does not fit into memory", str(folder / name)) from error


def most_bytes(shapes: Shapes) -> int:
    """Return the bytes of tensors in the widest float dtype.

    Example:
        >>> most_bytes({"W_enc": (4, 2), "b_enc": (4,)})
        96
    """
    return sum(8 * torch.Size(shape).numel() for shape in shapes.values())


@torch.no_grad()
def with_centre(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of an SAE that encodes x as those of one that encodes x - b_dec, as ours do: b_enc + W_enc b_dec.

    Example:
        >>> made = with_centre({"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "b_dec": torch.tensor([1.0, 2.0])})
        >>> made["b_enc"]
        tensor([1., 2.])
    """
    moved = tensors["W_enc"].double() @ tensors["b_dec"].double()
    return {**tensors, "b_enc": (tensors["b_enc"].double() + moved).float()}


def common(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Return the four tensors that every SAE has."""
    return {"W_enc": sae.W_enc.detach(), "b_enc": sae.b_enc.detach(), "W_dec": sae.W_dec.detach(), "b_dec": sae.b_dec.detach()}


@torch.no_grad()
def without_centre(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Return W_enc, b_enc, W_dec, b_dec and W_skip of the same SAE in a form that encodes x, not x - centre.

    The centre goes into b_enc, of a skip connection into b_dec; summed in float64, since rows may be far from zero.
    """
    centre = sae.centre.double()
    found = {**common(sae), "b_enc": (sae.b_enc.double() - sae.W_enc.double() @ centre).float()}
    if sae.config.skip:
        found["W_skip"] = sae.W_skip.detach()
        found["b_dec"] = (sae.b_dec.double() - sae.W_skip.double() @ centre).float()
    return found


def threshold_of(sae: SparseAutoencoder) -> Tensor:
    """Return the threshold of each latent, (n_latents,), of an architecture that has them."""
    threshold: Tensor = sae.threshold  # type: ignore[assignment]
    return threshold.detach()


def refuse(sae: SparseAutoencoder, library: str, why: str = "") -> UsageError:
    """Return the error that a library cannot hold this SAE."""
    kind = {"sae": "SAE"}.get(sae.widths.kind, sae.widths.kind)
    return UsageError(
        f"{library} has no form for a {kind} of architecture {sae.arch!r}{': ' if why else ''}{why}",
        do="--format actstore holds every SAE of ours",
    )


def is_crosscoder(sae: SparseAutoencoder) -> bool:
    """Return whether an SAE reads or reconstructs several stores side by side, which no other library's format says."""
    return len(sae.widths.inputs) > 1 or len(sae.widths.parts) > 1


def lineage(run: Run) -> dict[str, Any]:
    """Return where an SAE comes from, for the config of any format."""
    return {
        "actstore_run": run.digest, "actstore_store": run.store, "actstore_content_digest": run.content_digest,
        "actstore_architecture": run.config.arch, "actstore_k": run.config.k,
    }  # fmt: skip


def layer_of(hook: str) -> int | None:
    """Return the layer in a hook point's name, if there is one.

    Example:
        >>> layer_of("blocks.12.hook_resid_pre"), layer_of("hook_embed")
        (12, None)
    """
    return next((int(part) for part in hook.split(".") if part.isascii() and part.isdigit() and len(part) < 6), None)


def target_of(run: Run) -> dict[str, Any]:
    """Return the key of the store a transcoder reconstructs, empty for other SAEs."""
    return next((other.key.model_dump() for other in run.others if other.role == "target"), {})


def write_folder(out: Path, files: Mapping[str, Sequence[bytes | memoryview]]) -> list[Path]:
    """Write the files of a folder, which is made; return their paths. Raises: DiskFull, StorageFailed."""
    for name, pieces in files.items():
        durable.make_dir((out / name).parent)
        durable.write_new(out, name, pieces)
    durable.remove_tree(out / "tmp")
    return [out / name for name in files]
