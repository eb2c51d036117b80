"""dictionary_learning's folder: ae.pt, a torch archive of plain tensors, and config.json.

Source: saprmarks/dictionary_learning, `utils.load_dictionary` and the classes' `from_pretrained` (dictionary.py,
trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py). Traps: nn.Linear keeps the decoder as (d, n), the classes with
W_enc keep that as (d, n); `threshold` of BatchTopKSAE is one number and -1 is "unset"; JumpReluAutoEncoder subtracts no
centre after `from_pretrained`; AutoEncoder divides by the decoder's norms when they are not 1, as ours are.

ae.pt is a pickle inside a zip file. Reading it executes nothing: the entries are copied, uncompressed and bounded, into an
archive of our own writing, and torch's weights-only unpickler reads that one. It builds tensors and refuses all else.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actstore.digests import canonical_json
from actstore.errors import FormatError
from actstore.limits import MAX_HEADER_BYTES
from trainer.checkpoint import Run
from trainer.exchange import (
    Foreign,
    Latents,
    Parts,
    Shapes,
    Width,
    common,
    is_crosscoder,
    lineage,
    most_bytes,
    read_config,
    read_whole,
    refuse,
    threshold_of,
    with_centre,
    without_centre,
    write_folder,
)
from trainer.sae import SparseAutoencoder, Step
from trainer.sources import Sources

CLASSES = {
    "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder", "relu_l1": "AutoEncoder", "p_anneal": "AutoEncoder", "gated": "GatedAutoEncoder",
}  # fmt: skip
ARCHS = {
    "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoder": "relu_l1", "AutoEncoderNew": "relu_l1",
}  # fmt: skip
MAX_ENTRIES, MAX_GROUPS = 64, 4096  # of an archive (ours have at most eleven); of a Matryoshka SAE
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)


class Trainer(Foreign):
    """`trainer` of config.json."""

    dict_class: Literal[
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder",
        "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
    ]  # fmt: skip
    activation_dim: Width
    dict_size: Latents
    k: Latents | None = None


class Config(Foreign):
    """`config.json`."""

    trainer: Trainer


def export_sae(run: Run, sae: SparseAutoencoder, out: Path, open_sources: Callable[[], Sources]) -> list[Path]:
    """Write the folder. Raises: UsageError: dictionary_learning has no such SAE."""
    if sae.arch not in CLASSES or is_crosscoder(sae) or sae.widths.targets is not None:
        raise refuse(sae, "dictionary_learning")
    name = CLASSES[sae.arch]
    if sae.arch in ("batchtopk", "matryoshka") and not bool((threshold_of(sae) == threshold_of(sae)[0]).all()):
        name = "JumpReluAutoEncoder"  # each dimension was normalised by itself: the thresholds are no longer one number
    archive = io.BytesIO()
    torch.save({key: tensor.clone() for key, tensor in _state(sae, name).items()}, archive)
    config = {"trainer": _about(run, name), "buffer": {"d_submodule": run.d_model, "ctx_len": _sequences(run).get("seq_len")}}
    return write_folder(out, {"ae.pt": [archive.getbuffer()], "config.json": [canonical_json(config)]})


def _sequences(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.key.get("sequences", {})
    return found


def _about(run: Run, name: str) -> dict[str, Any]:
    hook = str(run.key.get("hook"))
    layer = next((int(part) for part in hook.split(".") if part.isascii() and part.isdigit()), None)
    return {
        "dict_class": name, "trainer_class": "actstore", "activation_dim": run.d_model, "dict_size": run.config.n_latents,
        "k": run.config.k, "lr": run.config.lr, "steps": run.config.steps, "seed": run.config.seed, "device": "cpu",
        "layer": layer, "lm_name": run.key.get("model", {}).get("name") or run.model, "submodule_name": hook,
        "wandb_name": name, **lineage(run),
    }  # fmt: skip


def _state(sae: SparseAutoencoder, name: str) -> dict[str, Tensor]:
    """Return the state dict of their class."""
    w = common(sae)
    linear = {"encoder.weight": w["W_enc"], "decoder.weight": w["W_dec"].T.contiguous()}
    if name == "AutoEncoder":
        return {"bias": w["b_dec"], "encoder.bias": w["b_enc"], **linear}
    if name == "GatedAutoEncoder":
        more = {key: sae.get_parameter(ours).detach() for key, ours in (("r_mag", "r_mag"), ("mag_bias", "b_mag"))}
        return {"decoder_bias": w["b_dec"], "gate_bias": w["b_enc"], **more, **linear}
    if name == "JumpReluAutoEncoder":
        w = without_centre(sae)
        return {**w, "W_enc": w["W_enc"].T.contiguous(), "threshold": threshold_of(sae)}
    limits = {"k": torch.tensor(sae.config.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    if name != "AutoEncoderTopK":
        limits["threshold"] = threshold_of(sae)[0]
    if name == "MatryoshkaBatchTopKSAE":
        return {**w, "W_enc": w["W_enc"].T.contiguous(), **limits, "group_sizes": torch.tensor(_groups(sae))}
    return {"b_dec": w["b_dec"], "encoder.bias": w["b_enc"], **linear, **limits}


def _groups(sae: SparseAutoencoder) -> list[int]:
    """Return the sizes of a Matryoshka SAE's groups; all latents are one where the prefixes were random."""
    n = sae.config.n_latents
    if sae.options.prefixes != "fixed":
        return [n]
    step = Step(0.0, torch.zeros(0, dtype=torch.bool), 1.0, torch)  # which fixed prefixes do not look at
    ends = sae.prefixes(step)  # type: ignore[operator]
    return [end - before for before, end in zip([0, *ends], ends, strict=False)]


def import_sae(folder: Path) -> Parts:
    """Read the folder; see `trainer.formats.import_sae`. Raises: FormatError."""
    config, text = read_config(folder, "config.json", Config)
    about, kind = config.trainer, config.trainer.dict_class
    shapes = _shapes(kind, about.activation_dim, about.dict_size)
    path = folder / "ae.pt"
    data = read_whole(folder, "ae.pt", most_bytes(shapes) + MAX_HEADER_BYTES)
    found = _read_archive(data, shapes, path)
    if "k" in found and int(found["k"]) != about.k:
        raise FormatError(f"k is {int(found['k'])} in ae.pt and {about.k} in config.json", str(folder))
    linear = "encoder.weight" in found
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    tensors = {
        "W_enc": found["encoder.weight"] if linear else found["W_enc"].T.contiguous(),
        "W_dec": found["decoder.weight"].T.contiguous() if linear else found["W_dec"],
        "b_enc": next(found[name] for name in ("encoder.bias", "b_enc", "gate_bias") if name in found),
        "b_dec": found[bias.get(kind, "b_dec")],
    }
    if kind == "GatedAutoEncoder":
        tensors |= {"r_mag": found["r_mag"], "b_mag": found["mag_bias"]}
    if kind in ("JumpReluAutoEncoder", "AutoEncoderNew"):
        tensors = with_centre(tensors)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        tensors["threshold"] = found["threshold"].expand(about.dict_size).contiguous()
    return Parts(ARCHS[kind], about.k or 1, tensors, (text, data))


def _shapes(kind: str, d: int, n: int) -> Shapes:
    """Return the tensors of a class's state dict; -1 is any length up to MAX_GROUPS."""
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
        if kind == "JumpReluAutoEncoder":
            return {**shapes, "threshold": (n,)}
        return {**shapes, "k": (), "threshold": (), "group_sizes": (-1,)}
    shapes = {"encoder.weight": (n, d), "decoder.weight": (d, n)}
    if kind == "GatedAutoEncoder":
        return {**shapes, "decoder_bias": (d,), "r_mag": (n,), "gate_bias": (n,), "mag_bias": (n,)}
    shapes["encoder.bias"] = (n,)
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return {**shapes, "bias" if kind == "AutoEncoder" else "decoder.bias": (d,)}
    return {**shapes, "b_dec": (d,), "k": (), "threshold": ()}


def _read_archive(data: bytes, shapes: Shapes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch archive. Raises: FormatError: anything but plain tensors of these names and shapes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what it is going to refuse
            found = torch.load(_copied(data), map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or set(found) != set(shapes):
            raise FormatError("not a state dict with the tensors of its class")
        return {name: _plain(name, found[name], shapes[name]) for name in shapes}
    except FormatError as error:
        raise FormatError(error.what, str(path), error.do) from error
    except Exception as error:
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise FormatError(f"torch's weights-only reader refuses it: {' '.join(reason.split())[:200]}", str(path)) from error


def _copied(data: bytes) -> io.BytesIO:
    """Return a torch archive's entries in an archive of our own: torch's zip reader never sees a stranger's directory.

    Raises: FormatError: no zip file, compressed (a bomb), too many or overlapping entries, or a large pickle.
    """
    if not data.startswith(b"PK\x03\x04"):
        raise FormatError("not a torch archive (a zip file): an older format of torch, or a bare pickle, is not read")
    clean = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as copy:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES or sum(entry.file_size for entry in entries) > len(data):
            raise FormatError("the archive's entries overlap, or are too many")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise FormatError("the archive is compressed or encrypted: torch writes it plain")
            if entry.filename.endswith("data.pkl") and entry.file_size > MAX_HEADER_BYTES // 16:
                raise FormatError(f"the archive's pickle has {entry.file_size} bytes: more than names and shapes take")
            copy.writestr(entry.filename, archive.read(entry))
    clean.seek(0)
    return clean


def _plain(name: str, tensor: Any, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor as a contiguous float32 one of its own. Raises: FormatError: no plain tensor of this shape."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_nested or tensor.is_quantized or tensor.dtype not in DTYPES:
        raise FormatError(f"{name} is no plain tensor")
    found = tuple(tensor.shape)
    if found != shape and not (shape == (-1,) and len(found) == 1 and found[0] <= MAX_GROUPS):
        raise FormatError(f"tensor {name} is {list(found)}, the config says {list(shape)}")
    copied: Tensor = tensor.detach().to(torch.float32, copy=True).contiguous()
    return copied
