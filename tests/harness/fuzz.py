"""Thousands of malformed inputs for each parser: only our own errors may come out, fast and in little memory.

    PYTHONPATH=tests python -m harness.fuzz --n 5000 --json

Inputs are valid files changed at a place of their structure (and sealed again with a right digest, as an attacker
would), or in their bytes. Each parser runs in a forked process whose address space may grow by 100 MB; an input may
take 1 s of processor time. `--control` adds a parser with a planted bug, which must be caught.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore.content import BadRecord, field_of, text_content
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import ActstoreError
from actstore.key import parse_key, parse_record
from actstore.manifest import parse_manifest, parse_row_group
from actstore.records import parse_line
from harness import report
from harness.stores import D_MODEL, small_groups, tiny_store

MEMORY_BYTES = 100_000_000
CPU_SECONDS = 1.0
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**15, 2**63, 2**64, -(2**63), 10**19, 1.0, -0.0, 0.5, 1e308, 5e-324, "", "0", "\0", "../x",
    "/etc/passwd", "a" * 5000, "\u202e", "\U0001f600", "NaN", "0" * 64, "f" * 64, "F" * 64, [], [[]], {}, {"": 0}, ["0" * 64], [0] * 300,  # noqa: E501
    {"format": 1}, {"$ref": "#"}, {"__class__": "os.system"}, "nan", "inf", "0x1p99999",
]  # fmt: skip
TOKENS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"-" + b"9" * 30, b"0" * 40, b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800",  # noqa: E501
    b"\\u0000", b"\0", b"[" * 3000, b'{"a":' * 3000, b"}", b"]", b'"', b",", b":", b"\n", b"\r\n", b" " * 1000, b"null", b"true", b"1.5", b"-1",  # noqa: E501
    b'"format":1,', b"\\", b"//", b"'", b"\xc3", b"\xf4\x90\x80\x80",
]  # fmt: skip
Parser = Callable[[bytes], object]


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Return (container, key or index) of every value inside a JSON value."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def change_structure(value: Any, rng: random.Random) -> Any:
    """Return a copy with one to three values replaced, removed, repeated or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        inside = places(value)
        if not inside:
            return rng.choice(HOSTILE)
        container, key = rng.choice(inside)
        match rng.choice(("replace", "replace", "replace", "remove", "add", "move", "near")):
            case "replace":
                container[key] = copy.deepcopy(rng.choice(HOSTILE))
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[rng.choice(("extra", "", "digest", "__proto__", "a" * 300))] = copy.deepcopy(rng.choice(HOSTILE))
            case "add":
                container.insert(key, copy.deepcopy(rng.choice(HOSTILE)))
            case "move":
                other, at = rng.choice(inside)
                container[key] = (
                    copy.deepcopy(other[at]) if at in other or (isinstance(other, list) and at < len(other)) else None
                )
            case _ if isinstance(container[key], int):
                container[key] = container[key] + rng.choice((-1, 1, 2**32, 0.5))
            case _ if isinstance(container[key], str) and container[key]:
                at = rng.randrange(len(container[key]))
                container[key] = container[key][:at] + rng.choice("0gF\u00e9\0/") + container[key][at + 1 :]
            case _:
                container[key] = [container[key]]
    return value


def sealed(value: Any, rng: random.Random) -> bytes:
    """Return JSON bytes; mostly canonical and, where the value ends in a digest, with the right one."""
    if isinstance(value, dict) and "digest" in value and rng.random() < 0.8:
        body = {name: part for name, part in value.items() if name != "digest"}
        value = {**body, "digest": sha256_bytes(canonical_json(body))}
    if rng.random() < 0.8:
        return canonical_json(value)
    text = json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.5 and text.startswith("{") and len(text) > 2:
        text = '{"format": 1, ' + text[1:]  # a repeated key
    return text.encode()


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four small changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = rng.randrange(1, 40)
        match rng.choice(("flip", "cut", "insert", "delete", "repeat", "noise")):
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + rng.choice(TOKENS) + data[at:]
            case "delete":
                data = data[:at] + data[at + length :]
            case "repeat":
                data = data[:at] + data[at : at + length] * rng.randrange(2, 50) + data[at:]
            case _:
                data = data[:at] + rng.randbytes(length) + data[at:]
    return data


def malformed(seed: bytes, value: Any, rng: random.Random) -> bytes:
    """Return one malformed input made of a valid one."""
    if value is not None and rng.random() < 0.7:
        return sealed(change_structure(value, rng), rng)
    return change_bytes(seed, rng)


def header_input(seed: bytes, rng: random.Random) -> bytes:
    """Return a malformed safetensors file: its length field, its JSON header, or its bytes changed."""
    length = int.from_bytes(seed[:8], "little")
    header = json.loads(seed[8 : 8 + length])
    data = malformed(seed[8 : 8 + length], header, rng)
    size = rng.choice((len(data), len(data), len(data), len(data) + 1, 0, 2**63, 10**7, rng.randrange(2**64)))
    return change_bytes(seed, rng) if rng.random() < 0.2 else size.to_bytes(8, "little") + data + seed[8 + length :]


def toml_input(seed: bytes, rng: random.Random) -> bytes:
    """Return a malformed TOML file: lines of fields with hostile values, or the bytes changed."""
    if rng.random() < 0.4:
        return change_bytes(seed, rng)
    values = ["nan", "inf", "-inf", "-1", "0", "true", "1e400", "9" * 5000, "[]", "[[1]]", "{}", '"x"', "1979-05-27", "[" * 3000, "'../x'", "0.5",  # noqa: E501
              "[1, 2]", str(2**64), "1" + "0" * 18, "{a = {b = 1}}", '["topk", "../x"]', "{" + "a." * 2000 + "b = 1}", '"\\ud800"', "-0.0"]  # fmt: skip # noqa: E501
    names = [line.split(b" ")[0].decode() for line in seed.splitlines()] + ["extra", "a.b.c", '""', "k.k"]
    lines = [f"{rng.choice(names)} = {rng.choice(values)}" for _ in range(rng.randrange(1, 5))]
    return "\n".join(lines).encode()


def read_line(data: bytes) -> object:
    """Parse a corpus line; a text must be one that can be stored."""
    value = parse_line(data)
    field = value if isinstance(value, BadRecord) else field_of(value, "text")
    found = field if isinstance(field, BadRecord) else text_content("text")(field)
    if isinstance(found, BadRecord):
        raise ActstoreError(found.reason)
    assert isinstance(found, str)
    return found.encode()


TOML = b"""arch = ["topk"]
n_latents = [1024, 2048]
k = 32
lr = 0.001
seed = [1, 2]
epochs = 1.0
rows = 1000
batch_size = 64
holdout = 0.02
skip_positions = 0
exclude_special = false
shuffle = "window"
shuffle_seed = 0
aux_k = 4
aux_alpha = 0.03
dead_after_rows = 1000
warmup_fraction = 0.05
decay_fraction = 0.2
"""


def parsers(folder: Path) -> dict[str, tuple[bytes, Parser, Callable[[bytes, random.Random], bytes] | None]]:
    """Return each parser with a valid input and, where JSON's is not used, its own maker of malformed inputs."""
    import torch
    from safetensors.torch import save

    from trainer.config import FitConfig, SaeConfig, load_config, parse_config, resolve, run_digest
    from trainer.saved import About, Commit, Result, parse_tensors

    store = tiny_store(folder)
    fleet = resolve(FitConfig(n_latents=(8,), k=(2,)), D_MODEL, 1000)
    config = {name: getattr(fleet[0], name) for name in SaeConfig.__dataclass_fields__}
    about = {"format": 1, "config": config, "store": store.digest, "content_digest": store.content_digest, "d_model": D_MODEL,
             "key": store.key.model_dump(), "model": "toy:2"}  # fmt: skip
    density = {"log10_edges": [-1.0, 0.0], "latents": [1], "never": 2}
    result = {"format": 1, "rows_seen": 5, "train": {"loss": 0.5}, "held_out": {"l0": 2.0, "density": density},
              "dead_fraction": 0.0,
              "dead_window_rows": 5, "sae_sha256": "0" * 64}  # fmt: skip
    commit = {"step": 3, "sha256": "0" * 64, "metrics_bytes": 7, "scalars": {"loss": 0.5}}
    shapes = {"W_enc": ((8, 2), torch.float32), "b_enc": ((8,), torch.float32), "since": ((8,), torch.int64)}
    weights = save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()})

    def read_about(data: bytes) -> object:
        found = parse_record(About, data, "config.json")
        return run_digest(parse_config(found.config, SaeConfig, "config.json"), found.content_digest)

    def read_toml(data: bytes) -> object:
        (folder / "fleet.toml").write_bytes(data)
        fit = parse_config(load_config(folder / "fleet.toml"), FitConfig, "trainer fit")
        return [run_digest(sae, "0" * 64) for sae in resolve(fit, 16, 1000)]

    def read_group(data: bytes) -> object:
        return parse_row_group(data, "0.json", D_MODEL, "float32")

    return {
        "manifest": ((store.path / "manifest.json").read_bytes(), parse_manifest, None),
        "record": ((store.path / "row_groups/0.json").read_bytes(), read_group, None),
        "key": ((store.path / "key.json").read_bytes(), parse_key, None),
        "corpus line": ('{"text":"some é text","n":[1,{"a":null}]}'.encode(), read_line, None),
        "run config": (canonical_json(about), read_about, None),
        "run result": (canonical_json(result), lambda data: parse_record(Result, data, "result.json"), None),
        "checkpoint commit": (canonical_json(commit), lambda data: parse_record(Commit, data, "3.json"), None),
        "safetensors": (weights, lambda data: parse_tensors(data, shapes, Path("sae.safetensors")), header_input),
        "TOML config": (TOML, read_toml, toml_input),
    }  # fmt: skip


def attack(parser: Parser, make: Callable[[random.Random], bytes], n: int, seed: int) -> dict[str, Any]:
    """Give a parser `n` malformed inputs and return what came of them; runs inside the limited process."""
    rng, tally = random.Random(seed), {"inputs": n, "refused": 0, "accepted": 0, "slowest_s": 0.0, "failures": []}
    for i in range(n):
        try:
            data = make(rng)
        except (ValueError, UnicodeError):  # the maker itself cannot spell it (a surrogate)
            data = rng.choice(TOKENS)
        started = time.process_time()
        try:
            parser(data)
            tally["accepted"] += 1
        except ActstoreError:
            tally["refused"] += 1
        except Exception:  # noqa: BLE001 - any other exception is what this looks for
            tally["failures"].append(f"input {i}, {data[:200]!r}: {traceback.format_exc(limit=-3)}")
        took = time.process_time() - started
        tally["slowest_s"] = max(tally["slowest_s"], round(took, 3))
        if took > CPU_SECONDS:
            tally["failures"].append(f"input {i}, {data[:200]!r}: {took:.1f} s")
    return tally


def limited(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a job in a forked process with a ceiling on its address space; a death of it is a failure."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        answer = json.dumps(job()).encode()
        while answer:
            answer = answer[os.write(write_end, answer) :]
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not data:
        return {"inputs": 0, "failures": [f"the process ended with status {status}"]}
    return json.loads(data)


def planted(data: bytes) -> object:
    """A parser with a bug, for the control: it trusts that a manifest has rows and a width to divide by."""
    value = json.loads(data)
    return value["rows"] // value["d_model"]


def run(folder: Path, n: int, seed: int = 0, control: bool = False) -> dict[str, dict[str, Any]]:
    """Attack every parser (or the planted one) with `n` inputs and return what came of it, by parser."""
    small_groups()
    found = parsers(folder)
    if control:
        found = {"planted": (found["manifest"][0], planted, None)}
    results = {}
    for name, (valid, parser, maker) in found.items():
        parser(valid)
        value = None if maker else json.loads(valid)

        def make(rng: random.Random, valid: bytes = valid, value: Any = value, maker: Any = maker) -> bytes:
            return maker(valid, rng) if maker else malformed(valid, value, rng)

        results[name] = limited(lambda parser=parser, make=make: attack(parser, make, n, seed))
    return results


def piece(n: int, seed: int = 0) -> report.Result:
    """Give every parser `n` inputs, and a parser with a planted bug some."""
    result = report.Result("fuzz", f"one malformed input: an error of ours within {CPU_SECONDS:g} s and {MEMORY_BYTES >> 20} MiB")
    with report.timed(result), report.scratch("fuzz") as folder:
        for name, one in run(folder, n, seed).items():
            result.n += one["inputs"]
            result.bad += [f"{name}: {failure}" for failure in one.pop("failures")]
            result.details[name] = one
        planted_bug = run(folder, min(n, 200), seed, control=True)["planted"]
        result.controls["a planted bug"] = {"n": planted_bug["inputs"], "bad": len(planted_bug["failures"])}
    return result


if __name__ == "__main__":
    report.main(piece, 5000)
