"""A reader of actstore's stores, written from format.md alone: python docs/reader.py STORE_FOLDER

It needs numpy and google_crc32c and nothing of actstore. `open_store` verifies every byte up to the content digest and
returns all arrays; `acts` as float32 where the stored dtype is bfloat16 or int8.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import google_crc32c
import numpy as np

DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "i1"}
CHUNK_NAMES = {"acts": "c.{}.0", "columns": "c.{}.0.0"}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def need(truth, what):
    if not truth:
        raise ValueError(f"not a store: {what}")


def sealed_json(data, what):
    """Parse a file that ends in a digest of itself: the SHA-256 of its bytes without that one member."""
    value = json.loads(data)
    need(canonical(value) == data, f"{what} is not canonical JSON")
    member = f'"digest":"{value["digest"]}",'.encode()
    need(sha256(data.replace(member, b"", 1)) == value["digest"], f"the digest of {what}")
    return value


def chunk(path, digests, dtype, shape):
    """Return one chunk file as an array, its padding included; a shape of None is the bytes of an `exact` chunk."""
    data = path.read_bytes()
    crc = struct.unpack("<I", data[-4:])[0]
    need(crc == digests["crc32c"] == google_crc32c.value(data[:-4]), f"the crc32c of {path}")
    need(sha256(data) == digests["sha256"], f"the SHA-256 of {path}")
    rows = np.frombuffer(data[:-4], dtype)
    return rows if shape is None else rows.reshape(shape)


def exact_rows(data, d):
    ones, length = struct.unpack("<II", data[:8].tobytes())
    need(ones == 1 and length == len(data) - 8, "the header of an exact chunk")
    return data[8:].view([("row", "<i4"), ("acts", "<f4", (d,))])


def read_group(folder, manifest, index):
    """Return the arrays of one row group by name, without padding."""
    dtype, d, size = manifest["key"]["dtype"], manifest["d_model"], manifest["group_rows"]
    rows = min(size, manifest["rows"] - index * size)
    record = sealed_json((folder / f"row_groups/{index}.json").read_bytes(), f"record {index}")
    identity = {name: record[name] for name in ("store", "index", "rows", "chunks")}
    need(sha256(canonical(identity)) == manifest["groups"][index], f"record {index} is not the one the manifest names")
    need((record["store"], record["index"], record["rows"]) == (manifest["store"], index, rows), f"record {index}")
    kinds = {"acts": (DTYPES[dtype], (size, d)), **dict.fromkeys(("tokens", "documents", "positions"), ("<i4", (size,)))}
    if dtype == "int8":
        kinds |= {"scale": ("<f4", (size,)), "columns": ("<f4", (1, 2, d)), "exact": ("u1", None)}
    need(set(record["chunks"]) == set(kinds), f"the chunks of record {index}")
    found = {}
    for name, (kind, shape) in kinds.items():
        path = folder / name / CHUNK_NAMES.get(name, "c.{}").format(index)
        found[name] = chunk(path, record["chunks"][name], kind, shape)
        if name not in ("columns", "exact"):
            found[name] = found[name][:rows]
    if dtype == "bfloat16":
        found["acts"] = (found["acts"].astype("<u4") << 16).view("<f4")
    if dtype == "int8":
        (mean, std), exact = found["columns"][0], exact_rows(found["exact"], d)
        acts = (found["acts"].astype("<f4") * found["scale"][:, None]) * std + mean
        acts[exact["row"]] = exact["acts"]
        found["acts"] = acts
    return {name: found[name] for name in ("acts", "tokens", "documents", "positions")}


def open_store(folder):
    """Verify a store up to its content digest; return its manifest and its arrays."""
    folder = Path(folder)
    manifest = sealed_json((folder / "manifest.json").read_bytes(), "manifest.json")
    need(manifest["format"] in (1, 2), f"format version {manifest['format']}")
    need(sha256(canonical(manifest["key"])) == manifest["store"] == folder.name, "the key, the digest or the folder's name")
    for name, digest in manifest["files"].items():
        need(sha256((folder / name).read_bytes()) == digest, f"the digest of {name}")
    if manifest["format"] == 2:
        table = (folder / "row_groups.bin").read_bytes()
        manifest["groups"] = [table[at : at + 32].hex() for at in range(0, len(table), 32)]
    need(len(manifest["groups"]) == -(-manifest["rows"] // manifest["group_rows"]), "the number of row groups")
    root = canonical({"groups": manifest["groups"], "key": manifest["store"], "rows": manifest["rows"]})
    need(sha256(root) == manifest["content_digest"], "the content digest")
    groups = [read_group(folder, manifest, i) for i in range(len(manifest["groups"]))]
    return manifest, {name: np.concatenate([g[name] for g in groups]) for name in groups[0]}


if __name__ == "__main__":
    found, arrays = open_store(sys.argv[1])
    print(f"verified {found['rows']} rows of {found['d_model']} in {len(found['groups'])} row groups: {found['content_digest']}")
