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
from trainer import exchange
from trainer.checkpoint import Run
from trainer.exchange import Foreign, Latents, Parts, Shapes, Width
from trainer.sae import SparseAutoencoder, Step
from trainer.sources import Sources

CLASSES = {
    "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "matryoshka_batchtopk": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder", "relu_l1": "AutoEncoder", "p_anneal": "AutoEncoder", "gated": "GatedAutoEncoder",
}  # fmt: skip
ARCHS = {**{name: arch for arch, name in CLASSES.items() if arch != "p_anneal"}, "AutoEncoderNew": "relu_l1"}
LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
NAMES = {  # of each class's tensors: ours
    "AutoEncoder": {**LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"},
    "AutoEncoderNew": {**LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"},
    "GatedAutoEncoder": {**LINEAR, "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag", "decoder_bias": "b_dec"},
    "JumpReluAutoEncoder": {**MATRICES, "threshold": "threshold"},
    "AutoEncoderTopK": {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"},
    "BatchTopKSAE": {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": MATRICES,
}
TRANSPOSED = ("decoder.weight", "W_enc")  # (d, n) there
UNCENTRED = ("JumpReluAutoEncoder", "AutoEncoderNew")  # they encode x, not x - b_dec
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
    if sae.arch not in CLASSES or exchange.is_crosscoder(sae) or sae.widths.targets is not None:
        raise exchange.refuse(sae, "dictionary_learning")
    name = CLASSES[sae.arch]
    if sae.arch in ("batchtopk", "matryoshka_batchtopk") and not bool(
        (exchange.threshold_of(sae) == exchange.threshold_of(sae)[0]).all()
    ):
        name = "JumpReluAutoEncoder"  # each dimension was normalised by itself: the thresholds are no longer one number
    archive = io.BytesIO()
    torch.save(_state(sae, name), archive)
    config = {"trainer": _about(run, name), "buffer": {"d_submodule": run.d_model, "ctx_len": run.key["sequences"]["seq_len"]}}
    return exchange.write_folder(out, {"ae.pt": [archive.getbuffer()], "config.json": [canonical_json(config)]})


def _about(run: Run, name: str) -> dict[str, Any]:
    hook = run.key["hook"]
    return {
        "dict_class": name, "trainer_class": "actstore", "activation_dim": run.d_model, "dict_size": run.config.n_latents,
        "k": run.config.k, "lr": run.config.lr, "steps": run.config.steps, "seed": run.config.seed, "device": "cpu",
        "layer": exchange.layer_of(hook), "lm_name": run.model_name, "submodule_name": hook,
        "wandb_name": name, **exchange.lineage(run),
    }  # fmt: skip


def _state(sae: SparseAutoencoder, name: str) -> dict[str, Tensor]:
    """Return the state dict of their class."""
    ours = exchange.without_centre(sae) if name in UNCENTRED else exchange.common(sae)
    if name == "GatedAutoEncoder":
        ours |= {key: sae.get_parameter(key).detach() for key in ("r_mag", "b_mag")}
    if name == "JumpReluAutoEncoder":
        ours["threshold"] = exchange.threshold_of(sae)
    found = {theirs: ours[mine].T if theirs in TRANSPOSED else ours[mine] for theirs, mine in NAMES[name].items()}
    if "TopK" in name:
        found["k"] = torch.tensor(sae.config.k, dtype=torch.int32)
        found["threshold"] = torch.tensor(-1.0) if name == "AutoEncoderTopK" else exchange.threshold_of(sae)[0]
    if name == "MatryoshkaBatchTopKSAE":
        found["group_sizes"] = torch.tensor(_groups(sae))
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}


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
    config, text = exchange.read_config(folder, "config.json", Config)
    about, kind = config.trainer, config.trainer.dict_class
    shapes = _shapes(kind, about.activation_dim, about.dict_size)
    path = folder / "ae.pt"
    data = exchange.read_whole(folder, "ae.pt", exchange.most_bytes(shapes) + MAX_HEADER_BYTES)
    found = _read_archive(data, shapes, path)
    if "k" in found and int(found["k"]) != about.k:
        raise FormatError(f"k is {int(found['k'])} in ae.pt and {about.k} in config.json", str(folder))
    tensors = {ours: found[name].T.contiguous() if name in TRANSPOSED else found[name] for name, ours in NAMES[kind].items()}
    if kind in UNCENTRED:
        tensors = exchange.with_centre(tensors)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        tensors["threshold"] = found["threshold"].expand(about.dict_size).contiguous()
    return Parts(ARCHS[kind], about.k or 1, tensors, (text, data))


def _shapes(kind: str, d: int, n: int) -> Shapes:
    """Return the tensors of a class's state dict; -1 is any length up to MAX_GROUPS."""
    ours = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,)}
    shapes: dict[str, tuple[int, ...]] = {name: ours.get(mine, (n,)) for name, mine in NAMES[kind].items()}
    shapes |= {name: shapes[name][::-1] for name in TRANSPOSED if name in shapes}
    if "TopK" in kind:
        shapes |= {"k": (), "threshold": ()}
    return {**shapes, "group_sizes": (-1,)} if kind == "MatryoshkaBatchTopKSAE" else shapes


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
