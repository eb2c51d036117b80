# ruff: noqa: E501 - a table reads best with one attack a line
"""The attacks: each a small function that makes a whole store, run, corpus or config hostile, and what must come of it.

The list only grows. A number, a name or a structure is forged as an attacker would: digests are made right again.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attacks.cell import Attack, Victim

from actstore.digests import canonical_json, sha256_bytes
from actstore.key import parse_key
from actstore.manifest import content_digest, rows_per_group

HEAD, VERIFY = ("actstore", "head", "{store}"), ("actstore", "verify", "{store}", "--data")
EVALUATE, INFO = ("trainer", "evaluate", "{run}"), ("trainer", "info", "{run}")
REPORT = ("trainer", "report", "{run}", "--rows", "64")
FEATURES = ("trainer", "features", "{run}", "--latent", "0")
FIT = ("trainer", "fit", "--store", "{store}", "--config", "fleet.toml")
CAPTURE = ("actstore", "capture", "--backend", "toy", "--model", "toy:2", "--hook", "hook_embed", "--seq-len", "8", "--corpus")
ATTACKS: list[Attack] = []
Build = Callable[[Victim], None]


def add(group: str, what: str, build: Build, error: str, code: int, command: tuple[str, ...], cpu_seconds: float = 1.0) -> None:
    """Register an attack."""
    ATTACKS.append(Attack(f"{group}: {what}", build, error, code, command, cpu_seconds))


def sealed(body: dict[str, Any]) -> bytes:
    """Return a record with the right digest at its end."""
    body = {name: value for name, value in body.items() if name != "digest"}
    return canonical_json({**body, "digest": sha256_bytes(canonical_json(body))})


def load(path: Path) -> dict[str, Any]:
    """Return a JSON file."""
    return json.loads(path.read_bytes())


def manifest(**fields: Any) -> Build:
    """Forge fields of the manifest; its own digest is right again."""

    def build(victim: Victim) -> None:
        path = victim.store / "manifest.json"
        path.write_bytes(sealed({**load(path), **fields}))

    return build


def manifest_text(change: Callable[[bytes], bytes]) -> Build:
    """Change the bytes of the manifest."""

    def build(victim: Victim) -> None:
        path = victim.store / "manifest.json"
        path.write_bytes(change(path.read_bytes()))

    return build


def small_file(name: str, change: Callable[[Any], Any]) -> Build:
    """Forge a small file that the manifest names, and the manifest with it."""

    def build(victim: Victim) -> None:
        path = victim.store / name
        data = change(load(path))
        path.write_bytes(data if isinstance(data, bytes) else canonical_json(data))
        whole = load(victim.store / "manifest.json")
        manifest(files={**whole["files"], name: sha256_bytes(path.read_bytes())})(victim)

    return build


def replaced(field: str, text: bytes) -> Build:
    """Put raw text in place of a field's value, as JSON text."""
    return manifest_text(lambda data: data.replace(b'"%s":' % field.encode(), b'"%s":%s,"x":' % (field.encode(), text), 1))


def in_place(name: str, make: Callable[[Path, Victim], object], where: str = "store") -> Build:
    """Put something else where a file was."""

    def build(victim: Victim) -> None:
        path: Path = getattr(victim, where) / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path, victim)

    return build


def fifo(path: Path, victim: Victim) -> None:
    """A FIFO that nobody writes to: a careless open blocks for good."""
    os.mkfifo(path)


def listening(path: Path, victim: Victim) -> None:
    """A socket."""
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path, victim: Victim) -> None:
    """/dev/zero: endless. Without root, a link to it."""
    if os.geteuid() == 0:
        os.mknod(path, 0o20644, os.makedev(1, 5))
    else:
        path.symlink_to("/dev/zero")


def folder(path: Path, victim: Victim) -> None:
    """A folder."""
    path.mkdir()


def link(path: Path, victim: Victim) -> None:
    """A link to a secret file outside."""
    path.symlink_to(victim.secret)


def sparse(path: Path, victim: Victim) -> None:
    """A terabyte of zeros that takes no space."""
    path.touch()
    os.truncate(path, 1 << 40)


def moved_outside(name: str) -> Build:
    """Move a folder out of the store and leave a link to it."""

    def build(victim: Victim) -> None:
        path = victim.store / name
        target = victim.home.parent / "outside" / (name or "store")
        path.rename(target)
        path.symlink_to(target)

    return build


class Payload:
    """What a pickle would execute."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def pickled(path: Path, victim: Victim) -> None:
    """A pickle that makes the marker file when it is loaded."""
    path.write_bytes(pickle.dumps(Payload(victim.marker)))


# fmt: off
# --- manifest ---------------------------------------------------------------------------------------------------------

for what, value in {
    "huge": 10**15, "negative": -1, "zero": 0, "a float": 1500.0, "a boolean": True, "a text": "1500", "2**63": 2**63, "a list": [1500],
}.items():
    add("manifest", f"rows {what}", manifest(rows=value), "FormatError", 7, HEAD)
add("manifest", "a number of 5,000 digits", replaced("rows", b"9" * 5000), "FormatError", 7, HEAD)
add("manifest", "NaN", replaced("rows", b"NaN"), "FormatError", 7, HEAD)
add("manifest", "1e999", replaced("rows", b"1e999"), "FormatError", 7, HEAD)
add("manifest", "nested 100,000 deep", replaced("provenance", b"[" * 100_000), "FormatError", 7, HEAD)
add("manifest", "nested 900 deep, well formed", replaced("provenance", b"[" * 900 + b"]" * 900), "FormatError", 7, HEAD)


def nested(depth: int) -> Build:
    """A manifest that is right in all but the depth of its provenance, where nobody looks."""

    def build(victim: Victim) -> None:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(10_000)
        value: Any = {}
        for _ in range(depth):
            value = {"a": value}
        manifest(provenance=value)(victim)
        sys.setrecursionlimit(limit)

    return build


for depth in (40, 100, 300, 600, 900):
    add("manifest", f"provenance nested {depth} deep, sealed", nested(depth), "FormatError", 7, HEAD)
add("manifest", "a repeated key", replaced("rows", b"5"), "FormatError", 7, HEAD)
add("manifest", "a lone surrogate", replaced("store", b'"\\ud800"'), "FormatError", 7, HEAD)
add("manifest", "not UTF-8", manifest_text(lambda data: data.replace(b"toy", b"t\xffy")), "FormatError", 7, HEAD)
add("manifest", "a BOM", manifest_text(lambda data: b"\xef\xbb\xbf" + data), "FormatError", 7, HEAD)
add("manifest", "empty", manifest_text(lambda data: b""), "FormatError", 7, HEAD)
add("manifest", "cut", manifest_text(lambda data: data[:-1]), "FormatError", 7, HEAD)
add("manifest", "trailing bytes", manifest_text(lambda data: data + b"\n"), "FormatError", 7, HEAD)
add("manifest", "an unknown field", manifest(rowz=1), "FormatError", 7, HEAD)
add("manifest", "an unknown version", manifest(format=3), "FormatError", 7, HEAD)
add("manifest", "format 2 with its row groups listed", manifest(format=2), "FormatError", 7, HEAD)


def tabled(change: Callable[[bytes], bytes], make: Callable[[Path, Victim], object] | None = None, **fields: Any) -> Build:
    """Turn the store into one of format 2 whose table of row groups is forged, or something else lies in its place."""

    def build(victim: Victim) -> None:
        whole = load(victim.store / "manifest.json")
        table = change(bytes.fromhex("".join(whole.pop("groups"))))
        whole["files"]["row_groups.bin"] = sha256_bytes(table)
        if make is None:
            (victim.store / "row_groups.bin").write_bytes(table)
        else:
            make(victim.store / "row_groups.bin", victim)
        (victim.store / "manifest.json").write_bytes(sealed({**whole, "format": 2, **fields}))

    return build


add("table", "one digest flipped", tabled(lambda t: bytes([t[0] ^ 1]) + t[1:]), "FormatError", 7, HEAD)
add("table", "two row groups swapped", tabled(lambda t: t[32:] + t[:32]), "FormatError", 7, HEAD)
add("table", "a byte too long", tabled(lambda t: t + b"x"), "FormatError", 7, HEAD)
add("table", "a byte too short", tabled(lambda t: t[:-1]), "FormatError", 7, HEAD)
add("table", "empty", tabled(lambda t: b""), "FormatError", 7, HEAD)
add("table", "missing", tabled(lambda t: t, lambda path, victim: None), "FormatError", 7, HEAD)
add("table", "a FIFO", tabled(lambda t: t, fifo), "FormatError", 7, HEAD)
add("table", "a sparse terabyte", tabled(lambda t: t, lambda path, victim: sparse(path, victim)), "FormatError", 7, HEAD)
add("table", "a link to a secret", tabled(lambda t: t, lambda path, victim: path.symlink_to(victim.secret)), "FormatError", 7, HEAD)
add("table", "of 2^47 rows", tabled(lambda t: t, rows=1 << 47, group_rows=rows_per_group(2, "float32", 1 << 47)), "FormatError", 7, HEAD)
add("table", "of -1 rows", tabled(lambda t: t, rows=-1), "FormatError", 7, HEAD)
add("manifest", "its store is a path", manifest(store="../../../etc/passwd"), "FormatError", 7, HEAD)
add("manifest", "d_model of another width", manifest(d_model=3), "FormatError", 7, HEAD)
add("manifest", "d_model huge", manifest(d_model=1 << 20, group_rows=1024), "FormatError", 7, HEAD)
add("manifest", "infinite statistics", manifest(statistics={"rows": 1500, "mean": "000000000000f07f" * 2, "m2": "0" * 32, "max_abs": "0" * 32, "norm_sum": "0x1p0"}), "FormatError", 7, HEAD)
add("manifest", "a million empty lists", manifest_text(lambda data: b"[" + b"[]," * 10_000_000 + b"[]]"), "FormatError", 7, HEAD)
add("manifest", "400,000 wrong digests", manifest(groups=["x" * 64] * 400_000), "FormatError", 7, HEAD)
add("manifest", "900,000 numbers for groups", manifest(groups=[0] * 900_000), "FormatError", 7, HEAD)
add("manifest", "an object of 500,000 fields", manifest(files={f"f{i}": "0" * 8 for i in range(500_000)}), "FormatError", 7, HEAD)
add("manifest", "33 MiB of text", manifest_text(lambda data: b'"' + b"x" * (33 << 20) + b'"'), "FormatError", 7, HEAD)
add("manifest", "endless: a sparse terabyte", in_place("manifest.json", sparse), "FormatError", 7, HEAD)
add("manifest", "deleted", lambda victim: (victim.store / "manifest.json").unlink(), "StoreNotSealed", 5, HEAD)
add("manifest", "of another store", lambda victim: shutil.copy(victim.twin / "manifest.json", victim.store), "FormatError", 7, HEAD)
add("manifest", "a pickle", in_place("manifest.json", pickled), "FormatError", 7, HEAD)
for name in ("../../outside/secret", "/etc/passwd", "acts/../../../outside/secret", "a\0b"):
    add("manifest", f"names the file {name!r}",
        lambda victim, name=name: manifest(files={**load(victim.store / "manifest.json")["files"], name: "0" * 64})(victim),
        "FormatError", 7, HEAD)


def another_seal(groups: Callable[[list[str]], list[str]], rows: int = 1500) -> Build:
    """A consistent manifest of other row groups: an older capture of the same key, or one that promises more rows."""

    def build(victim: Victim) -> None:
        whole = load(victim.store / "manifest.json")
        found = groups(whole["groups"])
        digest = content_digest(parse_key((victim.store / "key.json").read_bytes()), rows, found)
        manifest(groups=found, rows=rows, content_digest=digest)(victim)
        small_file("zarr.json", lambda group: json.loads(json.dumps(group).replace(whole["content_digest"], digest)))(victim)
        if rows != whole["rows"]:
            for array in ("acts", "tokens", "documents", "positions"):
                small_file(f"{array}/zarr.json", lambda about: {**about, "shape": [rows, *about["shape"][1:]]})(victim)

    return build


add("manifest", "rolled back to an older capture", another_seal(lambda found: ["0" * 64, *found[1:]]), "StoreDamaged", 1, HEAD)
add("manifest", "its row groups swapped", another_seal(lambda found: found[::-1]), "StoreDamaged", 1, HEAD)
add("manifest", "promises rows that are not there", another_seal(lambda found: [*found, "0" * 64], 3000), "StoreDamaged", 1, HEAD)

# --- key, records, vocabulary -----------------------------------------------------------------------------------------

add("key", "of another store", small_file("key.json", lambda key: {**key, "hook": "other"}), "FormatError", 7, HEAD)
add("key", "a path in every name", small_file("key.json", lambda key: {**key, "hook": "../../x", "text_field": "/etc"}), "FormatError", 7, HEAD)
add("key", "changed, digest not", in_place("key.json", lambda path, victim: path.write_bytes(b"{}")), "StoreDamaged", 1, HEAD)
add("vocabulary", "tokens are numbers", small_file("vocabulary.json", lambda v: {**v, "tokens": [1, 2]}), "FormatError", 7, HEAD)
add(
    "vocabulary",
    "tokens are an object",
    small_file("vocabulary.json", lambda v: {**v, "tokens": {"0": "a"}}),
    "FormatError",
    7,
    HEAD,
)
add(
    "vocabulary",
    "special ids are texts",
    small_file("vocabulary.json", lambda v: {**v, "special": ["../x"]}),
    "FormatError",
    7,
    HEAD,
)
add("vocabulary", "a list", small_file("vocabulary.json", lambda v: []), "FormatError", 7, HEAD)
add("vocabulary", "16 MiB of tokens", small_file("vocabulary.json", lambda v: b'{"tokens":[' + b'"a",' * 4_000_000 + b'"a"],"special":[]}'), "FormatError", 7, HEAD)
add("record", "not JSON", in_place("row_groups/0.json", lambda path, victim: path.write_bytes(b"x")), "StoreDamaged", 1, HEAD)
add("record", "missing", in_place("row_groups/0.json", lambda path, victim: None), "StoreDamaged", 1, HEAD)
add("record", "of the next row group", lambda victim: shutil.copy(victim.store / "row_groups/1.json", victim.store / "row_groups/0.json"), "StoreDamaged", 1, HEAD)
add("record", "of another store", lambda victim: shutil.copy(victim.twin / "row_groups/0.json", victim.store / "row_groups/0.json"), "StoreDamaged", 1, HEAD)


def mixed(victim: Victim) -> None:
    """Record and chunks of one row group, all from another store (mix and match)."""
    for name in ("row_groups/0.json", "acts/c.0.0", "tokens/c.0", "documents/c.0", "positions/c.0"):
        shutil.copy(victim.twin / name, victim.store / name)


def forged_record(victim: Victim) -> None:
    """A chunk of zeros with a record that fits it; only the manifest gives it away."""
    path = victim.store / "row_groups/0.json"
    record = load(path)
    record["chunks"]["acts"] = dict(record["chunks"]["tokens"])
    path.write_bytes(sealed(record))


add("record", "and chunks of another store", mixed, "StoreDamaged", 1, HEAD)
add("record", "forged to fit other chunks", forged_record, "StoreDamaged", 1, HEAD)

# --- Zarr metadata ----------------------------------------------------------------------------------------------------

GZIP = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip", "configuration": {"level": 9}}]
for what, fields in {
    "a gzip codec": {"codecs": GZIP}, "no codec": {"codecs": []}, "another shape": {"shape": [10**15, 2]}, "fill value 0": {"fill_value": 0},
    "a storage transformer": {"storage_transformers": [{"name": "x"}]}, "another dtype": {"data_type": "float64"}, "names": {"dimension_names": ["a", "b"]},
    "a float in the shape": {"shape": [1500.0, 2]}, "an unknown field": {"must_understand": False}, "attributes": {"attributes": {"a": 1}},
    "a separator that makes paths": {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}},
}.items():
    add("zarr", what, small_file("acts/zarr.json", lambda about, fields=fields: {**about, **fields}), "FormatError", 7, HEAD)
add("zarr", "an array's metadata is a list", small_file("tokens/zarr.json", lambda about: []), "FormatError", 7, HEAD)
add("zarr", "consolidated metadata", small_file("zarr.json", lambda group: {**group, "consolidated_metadata": {"metadata": {}}}), "FormatError", 7, HEAD)
add("zarr", "other attributes", small_file("zarr.json", lambda group: {**group, "attributes": {}}), "FormatError", 7, HEAD)
add("zarr", "an extra array", lambda victim: shutil.copytree(victim.store / "tokens", victim.store / "more"), "StoreDamaged", 1, VERIFY)
add("zarr", "a hidden link to a folder", lambda victim: (victim.store / "acts" / ".x").symlink_to("/etc"), "StoreDamaged", 1, VERIFY)

# --- chunks, links, special files -------------------------------------------------------------------------------------

CHUNK = "acts/c.0.0"
add("chunk", "a gzip bomb", in_place(CHUNK, lambda path, victim: path.write_bytes(gzip.compress(bytes(1 << 24)))), "StoreDamaged", 1, HEAD)
add("chunk", "right length, zeros", in_place(CHUNK, lambda path, victim: path.write_bytes(bytes(8196))), "StoreDamaged", 1, HEAD)
add("chunk", "missing", in_place(CHUNK, lambda path, victim: None), "StoreDamaged", 1, HEAD)
add("chunk", "endless: a sparse terabyte", in_place(CHUNK, sparse), "StoreDamaged", 1, HEAD)
add("chunk", "of another row group", lambda victim: shutil.copy(victim.store / "acts/c.1.0", victim.store / CHUNK), "StoreDamaged", 1, HEAD)
add("chunk", "of another store", lambda victim: shutil.copy(victim.twin / CHUNK, victim.store / CHUNK), "StoreDamaged", 1, HEAD)
SPECIAL = {"a FIFO": fifo, "a socket": listening, "a device": device, "a folder": folder, "a link to a secret": link}
for what, make in SPECIAL.items():
    for name in ("manifest.json", "key.json", "zarr.json", "acts/zarr.json", "vocabulary.json", CHUNK):
        add("special", f"{what} for {name}", in_place(name, make), "FormatError", 7, HEAD)
    add("special", f"{what} for a record", in_place("row_groups/0.json", make), "StoreDamaged", 1, HEAD)
    add("special", f"{what} for a chunk, verified", in_place(CHUNK, make), "StoreDamaged", 1, VERIFY)
    for name in ("config.json", "result.json", "sae.safetensors"):
        add("special", f"{what} for a run's {name}", in_place(name, make, "run"), "FormatError", 7, EVALUATE)
    add("special", f"{what} for a run's features.json", in_place("features.json", make, "run"), "FormatError", 7, FEATURES)
    add("special", f"{what} for the TOML config", in_place("fleet.toml", make, "home"), "FormatError", 7, FIT)
for name in ("acts", "tokens", ""):
    add("link", f"{name or 'the store'} is a link outside", moved_outside(name), "FormatError", 7, HEAD)
add("link", "row_groups is a link outside", moved_outside("row_groups"), "StoreDamaged", 1, HEAD)
add("link", "acts is a file", in_place("acts", lambda path, victim: path.write_bytes(b"")), "FormatError", 7, HEAD)
add("link", "the store's folder has another name", lambda victim: victim.store.rename(victim.store.with_name("0" * 64)), "FormatError", 7, ("actstore", "head", "00000000"))

# --- SAEs of other programs -------------------------------------------------------------------------------------------

IMPORTED = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"}


def theirs(name: str, change: Callable[[Path, Victim], object] = lambda folder, victim: None, **fields: Any) -> Build:
    """Make a foreign folder of a small SAE, with fields of its config changed, and do something to it."""

    def build(victim: Victim) -> None:
        import torch
        from safetensors.torch import save_file

        folder = victim.home / "theirs"
        folder.mkdir()
        matrices = {"W_enc": (2, 8), "W_dec": (8, 2), "b_enc": (8,), "b_dec": (2,)} if name == "saelens" else {
            "encoder.weight": (8, 2), "encoder.bias": (8,), "b_dec": (2,), **({"W_dec": (8, 2)} if name == "sparsify" else {"decoder.weight": (2, 8)})}
        weights = {key: torch.zeros(shape) for key, shape in matrices.items()}
        config: dict[str, Any] = {"architecture": "topk", "d_in": 2, "d_sae": 8, "num_latents": 8, "k": 2, "metadata": {"sae_lens_version": "6.54.12"},
                                  "dict_class": "AutoEncoderTopK", "activation_dim": 2, "dict_size": 8, **fields}  # fmt: skip
        if name == "dictionary_learning":
            torch.save({**weights, "k": torch.tensor(2), "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
            config = {"trainer": config}
        else:
            save_file(weights, folder / IMPORTED[name])
        (folder / ("config.json" if name == "dictionary_learning" else "cfg.json")).write_bytes(canonical_json(config))
        change(folder, victim)

    return build


def repacked(change: Callable[[list[tuple[str, bytes]], Victim], list[tuple[str, bytes]]], compression: int = zipfile.ZIP_STORED) -> Callable[[Path, Victim], None]:
    """Write the entries of ae.pt again, changed."""

    def build(folder: Path, victim: Victim) -> None:
        with zipfile.ZipFile(folder / "ae.pt") as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(folder / "ae.pt", "w", compression) as archive:
            for name, data in change(entries, victim):
                archive.writestr(name, data)

    return build


def payload_of(victim: Victim) -> bytes:
    """The bytes of the pickle that executes something."""
    pickled(victim.home / "payload", victim)
    data = (victim.home / "payload").read_bytes()
    (victim.home / "payload").unlink()
    return data


def imports(name: str) -> tuple[str, ...]:
    """The command that imports the folder."""
    return ("trainer", "import", "theirs", "--format", name, "--store", "{store}")


PAYLOAD = repacked(lambda entries, victim: [(name, payload_of(victim) if name.endswith("data.pkl") else data) for name, data in entries])
for name, file in IMPORTED.items():
    for what, make in SPECIAL.items():
        add("import", f"{what} for {name}'s {file}", theirs(name, lambda folder, victim, file=file, make=make: in_place(f"theirs/{file}", make, "home")(victim)), "FormatError", 7, imports(name))
    add("import", f"a pickle for {name}'s {file}", theirs(name, lambda folder, victim, file=file: pickled(folder / file, victim)), "FormatError", 7, imports(name))
    add("import", f"a sparse terabyte for {name}'s {file}", theirs(name, lambda folder, victim, file=file: sparse(folder / file, victim)), "FormatError", 7, imports(name))
    add("import", f"{name}: 2**24 latents", theirs(name, d_sae=1 << 24, num_latents=1 << 24, dict_size=1 << 24), "FormatError", 7, imports(name))
    add("import", f"{name}: rows of another width", theirs(name, d_in=3, activation_dim=3), "FormatError", 7, imports(name))
add("import", "a payload in a torch archive", theirs("dictionary_learning", PAYLOAD), "FormatError", 7, imports("dictionary_learning"))
add("import", "a compressed torch archive", theirs("dictionary_learning", repacked(lambda entries, victim: entries, zipfile.ZIP_DEFLATED)), "FormatError", 7, imports("dictionary_learning"))
add("import", "a zip bomb", theirs("dictionary_learning", repacked(lambda entries, victim: [*entries, ("archive/data/9", bytes(1 << 28))], zipfile.ZIP_DEFLATED)), "FormatError", 7, imports("dictionary_learning"), 5.0)
add("import", "an archive with paths out of it", theirs("dictionary_learning", repacked(lambda entries, victim: [("../../escape", b"x"), *entries])), "FormatError", 7, imports("dictionary_learning"))

# --- runs -------------------------------------------------------------------------------------------------------------


def run_file(name: str, change: Callable[[Any], Any]) -> Build:
    """Forge a JSON file of a run."""

    def build(victim: Victim) -> None:
        data = change(load(victim.run / name))
        (victim.run / name).write_bytes(data if isinstance(data, bytes) else canonical_json(data))

    return build


def weights(change: Callable[[dict[str, Any], bytes], tuple[bytes, bytes]]) -> Build:
    """Forge the header of the run's safetensors file; result.json names the digest of the forgery."""

    def build(victim: Victim) -> None:
        path = victim.run / "sae.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header, body = change(json.loads(data[8 : 8 + length]), data[8 + length :])
        path.write_bytes(struct.pack("<Q", len(header)) + header + body)
        trust_weights(victim)

    return build


def trust_weights(victim: Victim) -> None:
    """Make result.json name the weights that are there."""
    digest = sha256_bytes((victim.run / "sae.safetensors").read_bytes())
    run_file("result.json", lambda result: {**result, "sae_sha256": digest})(victim)


def raw_weights(data: bytes) -> Build:
    """Put other bytes in place of the weights."""

    def build(victim: Victim) -> None:
        (victim.run / "sae.safetensors").write_bytes(data)
        trust_weights(victim)

    return build


def pickled_weights(victim: Victim) -> None:
    """A pickle in place of the weights, its digest recorded."""
    pickled(victim.run / "sae.safetensors", victim)
    trust_weights(victim)


def tensors(n: int) -> bytes:
    """A header of many empty tensors."""
    return b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(n)) + b"}"


def overlapping(header: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
    """All tensors begin at 0."""
    for tensor in header.values():
        start, stop = tensor["data_offsets"]
        tensor["data_offsets"] = [0, stop - start]
    return canonical_json(header), body


def reshaped(header: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
    """W_enc is as large, but of another shape."""
    header["W_enc"]["shape"] = header["W_enc"]["shape"][::-1]
    return canonical_json(header), body


add("run", "a pickle for weights", pickled_weights, "FormatError", 7, EVALUATE)
add("run", "a pickle for weights, digest not recorded", in_place("sae.safetensors", pickled, "run"), "FormatError", 7, EVALUATE)
add("run", "a pickle for its config", in_place("config.json", pickled, "run"), "FormatError", 7, INFO)
add("run", "a pickle for its result", in_place("result.json", pickled, "run"), "FormatError", 7, INFO)
add("safetensors", "200,000 tensors", weights(lambda header, body: (tensors(200_000), b"")), "FormatError", 7, EVALUATE)
add("safetensors", "10**7 tensors", lambda victim: (victim.run / "sae.safetensors").write_bytes(struct.pack("<Q", 600_000_000) + tensors(10_000) * 2), "FormatError", 7, EVALUATE)
add("safetensors", "overlapping tensors", weights(overlapping), "FormatError", 7, EVALUATE)
add("safetensors", "a tensor of another shape", weights(reshaped), "FormatError", 7, EVALUATE)
add("safetensors", "one tensor more", weights(lambda header, body: (canonical_json({**header, "x": header["b_dec"]}), body)), "FormatError", 7, EVALUATE)
add("safetensors", "a tensor less", weights(lambda header, body: (canonical_json({"W_enc": header["W_enc"]}), body)), "FormatError", 7, EVALUATE)
add("safetensors", "a negative offset", weights(lambda header, body: (canonical_json({**header, "b_dec": {**header["b_dec"], "data_offsets": [-8, 0]}}), body)), "FormatError", 7, EVALUATE)
add("safetensors", "shape of 10**18", weights(lambda header, body: (canonical_json({**header, "b_dec": {**header["b_dec"], "shape": [10**18]}}), body)), "FormatError", 7, EVALUATE)
add("safetensors", "a header of 2**63 bytes", raw_weights(struct.pack("<Q", 1 << 63) + b"{}"), "FormatError", 7, EVALUATE)
add("safetensors", "empty", raw_weights(b""), "FormatError", 7, EVALUATE)
add("safetensors", "header nested deep", weights(lambda header, body: (b"[" * 50_000, body)), "FormatError", 7, EVALUATE)
add("safetensors", "a repeated tensor", weights(lambda header, body: (b'{"b_dec":{},' + canonical_json(header)[1:], body)), "FormatError", 7, EVALUATE)
add("safetensors", "a sparse terabyte", in_place("sae.safetensors", sparse, "run"), "FormatError", 7, EVALUATE)
for what, fields in {
    "a huge width": {"d_model": 1 << 40}, "a width of text": {"d_model": "2"}, "an unknown field": {"x": 1}, "another version": {"format": 9},
    "a store that is a path": {"store": "../../outside"}, "a key that is a text": {"key": "x"}, "a config that is a list": {"config": []},
    "a config of another run": {"config": {"arch": "../../x"}},
}.items():
    add("run", what, run_file("config.json", lambda about, fields=fields: {**about, **fields}), "FormatError", 7, INFO)
for what, fields in {
    "numbers that are texts": {"held_out": {"l0": "x"}}, "a list of numbers": {"train": []}, "a huge count": {"rows_seen": 10**19},
    "a density that is a list": {"held_out": {"density": []}}, "a digest that is a path": {"sae_sha256": "../x"},
}.items():
    add("run", f"result with {what}", run_file("result.json", lambda result, fields=fields: {**result, **fields}), "FormatError", 7, INFO)
add("run", "metrics that are no numbers", lambda victim: (victim.run / "metrics.jsonl").write_text('{"rows":"x"}\n'), "FormatError", 7, REPORT)
add("run", "metrics without end", in_place("metrics.jsonl", sparse, "run"), "FormatError", 7, REPORT)
def features(record: dict[str, Any] | None = None, **changes: Any) -> Build:
    """Put features into the run that say something else than a pass over the rows would."""

    def build(victim: Victim) -> None:
        from trainer.checkpoint import read_run
        from trainer.features import FeaturesRecord, save_features, shapes_of

        run = read_run(victim.run)
        arrays = {name: np.zeros(shape) for name, (shape, _) in shapes_of(run.config.n_latents, 0, False).items()}
        for name, value in changes.items():
            arrays[name][:] = value
        about = {"format": 1, "store": run.store, "content_digest": run.content_digest, "store_rows": 10**6, "rows": 64,
                 "rows_counted": 63, "skip_positions": 1, "sha256": "0" * 64}  # fmt: skip
        save_features(run, FeaturesRecord(**{**about, **(record or {})}), arrays)

    return build


for what, build in {
    "rows beyond the store": features({"rows": 10**6}, rows=10**6 - 1), "rows beyond its own": features(rows=64),
    "a row of -2": features(rows=-2), "a latent that there is not": features(neighbours=8), "infinite values": features(values=np.inf),
    "of another store": features({"store": "0" * 64}),
}.items():  # fmt: skip
    add("features", what, build, "FormatError", 7, FEATURES)
add("run", "its folder is a link", lambda victim: (victim.run.rename(victim.home / "away"), victim.run.symlink_to(victim.home / "away"))[0], "FormatError", 7, INFO)

# --- corpora ----------------------------------------------------------------------------------------------------------


def corpus(name: str, data: bytes) -> Build:
    """Write a corpus file."""
    return lambda victim: (victim.home / name).write_bytes(data) and None


GOOD = b'{"text":"a good line"}\n'
for what, line in {
    "not JSON": b"{broken}", "not an object": b"[1]", "another field": b'{"txt":"x"}', "a number for text": b'{"text":5}',
    "not UTF-8": b'{"text":"\xff"}', "half a surrogate pair": b'{"text":"\\ud800"}', "a NUL": b'{"text":"a\0b"}', "nested deep": b"[" * 100_000,
    "5,000 digits": b'{"text":"a","n":' + b"9" * 5000 + b"}",
}.items():
    add("corpus", what, corpus("bad.jsonl", GOOD + line + b"\n" + GOOD), "CorpusError", 3, (*CAPTURE, "bad.jsonl"))
add("corpus", "a BOM", corpus("bad.jsonl", b"\xef\xbb\xbf" + GOOD), "CorpusError", 3, (*CAPTURE, "bad.jsonl"))
add("corpus", "empty", corpus("bad.jsonl", b"\n"), "CorpusError", 3, (*CAPTURE, "bad.jsonl"))
add("corpus", "a damaged gzip stream", corpus("bad.jsonl.gz", gzip.compress(GOOD * 100)[:40] + b"\0" * 30), "CorpusError", 3, (*CAPTURE, "bad.jsonl.gz"))
add("corpus", "a cut gzip stream", corpus("bad.jsonl.gz", gzip.compress(GOOD * 100)[:-9]), "CorpusError", 3, (*CAPTURE, "bad.jsonl.gz"))
add("corpus", "not Parquet", corpus("bad.parquet", b"PAR1" + bytes(100) + b"PAR1"), "CorpusError", 3, (*CAPTURE, "bad.parquet"), 3.0)
for what, make in {"a FIFO": fifo, "a socket": listening, "a device": device}.items():
    add("corpus", what, in_place("bad.jsonl", make, "home"), "CorpusError", 3, (*CAPTURE, "bad.jsonl"))

# --- arguments --------------------------------------------------------------------------------------------------------

for what, text in {"a path": "..", "too short": "abc", "upper case": "ABCDEF01", "a NUL": "abcd\0", "too long": "a" * 65, "digits of another script": "٣" * 8}.items():
    for program in (("actstore", "info"), ("actstore", "verify"), ("trainer", "info"), ("trainer", "fit", "--store")):
        add("hash", f"{what} for {' '.join(program)}", lambda victim: None, "UsageError", 2, (*program, text))
for text in ("../stores", "/etc", "a/\0", "./stores/../outside"):
    add("hash", f"{text!r} for actstore info", lambda victim: None, "UsageError", 2, ("actstore", "info", text))
    add("hash", f"{text!r} for actstore rm", lambda victim: None, "UsageError", 2, ("actstore", "rm", "--yes", text))
add("hash", "ambiguous", lambda victim: shutil.copytree(victim.store, victim.store.with_name(victim.store.name[:8] + "0" * 56)), "UsageError", 2, ("actstore", "info", "{store:.8}"))


def toml(text: bytes) -> Build:
    """Write the fleet's config file."""
    return lambda victim: (victim.home / "fleet.toml").write_bytes(text) and None


for what, text in {
    "an unknown field": b"latents = 3", "a name that is a path": b'arch = "../../x"', "a number of 5,000 digits": b"k = " + b"9" * 5000,
    "nested deep": b"k = " + b"[" * 5_000, "a wrong type": b'k = "many"', "a huge dictionary": b"n_latents = 99999999999", "infinite": b"aux_alpha = inf",
    "NaN": b"holdout = nan", "negative": b"warmup_fraction = -inf", "10**12 epochs": b"epochs = 1e300", "not UTF-8": b"\xff", "a repeated key": b"k = 1\nk = 2",
    "a date": b"k = 1979-05-27", "k over n_latents": b"k = 64\nn_latents = 32", "no entry": b"k = []", "1,500 SAEs": b"seed = [%s]" % b",".join(b"%d" % i for i in range(1500)),
}.items():
    add("TOML", what, toml(text), "UsageError", 2, FIT)
add("TOML", "8 kB of dots", toml(b"a." * 4_000 + b"a = 1"), "UsageError", 2, FIT)
add("TOML", "8 kB of tables", toml(b"".join(b"[a.b%d]\n" % i for i in range(3000))[:7_900] + b"\nx = ["), "UsageError", 2, FIT)
add("TOML", "of two megabytes", toml(b"#" * (2 << 20)), "FormatError", 7, FIT)
