"""What tests share besides fixtures: paths, corpora, and the development data that may be absent."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from actstore.digests import canonical_json, sha256_bytes
from actstore.manifest import Manifest, dump_record
from actstore.reader import Store, open_folder

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-gpt2"
FIXTURES = ROOT.parent / "shared" / "fixtures"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def words(n_documents: int, n_words: int = 40, seed: int = 0) -> list[str]:
    """Deterministic documents with a Zipf-like vocabulary, so that an SAE has something to find."""
    rng = random.Random(seed)
    vocabulary = [bytes(rng.choices(range(97, 123), k=rng.randint(2, 7))).decode() for _ in range(200)]
    return [" ".join(vocabulary[min(199, int(rng.paretovariate(0.8)) - 1)] for _ in range(n_words)) for _ in range(n_documents)]


def activations(backend, tokens, lengths, hooks, dtypes=None):
    """The rows of one batch, in the compute dtype unless others are named."""
    return backend.launch(tokens, lengths, hooks, dtypes or [backend.compute_dtype] * len(hooks))()


def cannot(reason: str) -> None:
    """End a test that needs what this machine lacks: skipped with the reason, but failed in CI, where all must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def shared_fixture(name: str) -> Path:
    """Return a path below ../shared/fixtures, or skip the test with the reason."""
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine: it is development data that the project does not ship")
    return path


def writable(store: Store) -> Path:
    for path in [store.path, *store.path.rglob("*")]:
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    return store.path


def reopened(store: Store) -> Store:
    return open_folder(store.path)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def hostile(manifest: Manifest, **fields) -> bytes:
    """A manifest with fields changed and its own digest made right again, as an attacker would."""
    body = {**json.loads(dump_record(manifest)), **fields}
    body.pop("digest")
    return canonical_json({**body, "digest": sha256_bytes(canonical_json(body))})


class StopRequestError(BaseException):
    """What a signal handler would ask for."""


def stop_after(n: int):
    """Return the progress of a fit that is asked to stop after n steps, as by Ctrl-C."""
    from trainer import FitProgress  # here: harness processes that import this file never train

    steps = []
    return FitProgress(
        on_step=lambda rows, latest: steps.append(rows), stop=lambda: StopRequestError() if len(steps) >= n else None
    )
