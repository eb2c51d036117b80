"""Shared fixtures: small corpora, toy and tiny-model stores. Real files under tmp_path, no mocks of our own code."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs one process a core; more threads would fight over them

from bucket_server import Proxy, proxied, s3_server, set_environment
from harness.warm import warm_commands
from helpers import cannot, words, write_jsonl

from actstore import durable
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.reader import Store

# The same examples in every run, and no limit on their time: neither chance nor a busy machine decides a test.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")

# The harness has no tests or doctests of its own, and two of its modules import torch and TransformerLens.
collect_ignore_glob = ["harness/*"]


# The files that take longest, so that none of them is begun last, when the other processes have nothing left to do.
LONGEST = (
    "test_07_training_resumes_bit_for_bit", "test_02_all_or_nothing", "test_01_committed_is_durable", "test_03_resume_is_exact",
    "test_shared_recipes", "test_bucket_capture", "test_recipes", "test_distributed", "test_remote", "test_04_damage_is_found",
    "test_architectures", "test_06_one_writer_a_row_group", "test_packaging", "test_extending", "test_commands", "test_capturing",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _no_step_hook():
    yield
    durable.step_hook = None


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    return lambda texts, name="corpus.jsonl": write_jsonl(tmp_path / name, texts)


@pytest.fixture
def toy_request(tmp_path: Path) -> Callable[..., CaptureRequest]:
    """A request for the toy backend; any field can be overridden."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", words(60))

    def make(**fields) -> CaptureRequest:
        values = {
            "model": "toy:16", "hooks": ("blocks.0.hook_resid_pre",), "corpus": (corpus,), "seq_len": 32,
            "backend": "toy", "stores": tmp_path / "stores", "batch_tokens": 256,
        }  # fmt: skip
        return CaptureRequest(**{**values, **fields})

    return make


@pytest.fixture
def toy_store(toy_request) -> Store:
    request = toy_request()
    return open_store(capture(request)[0], request.stores)


@pytest.fixture(scope="session")
def toy_session_store(tmp_path_factory) -> Store:
    """A toy store of some thousand rows that trainer tests share and never change."""
    folder = tmp_path_factory.mktemp("toy")
    corpus = write_jsonl(folder / "corpus.jsonl", words(40, 50))
    request = CaptureRequest(
        model="toy:32", hooks=("blocks.1.hook_resid_pre",), corpus=(corpus,), seq_len=64, backend="toy", stores=folder / "stores"
    )
    return open_store(capture(request)[0], request.stores)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Modules of Python's standard library as documents for the embedded model: not our own, which every commit changes."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [path for path in library if 4_000 < path.stat().st_size < 12_000][:48]
    return write_jsonl(tmp_path_factory.mktemp("tiny") / "source.jsonl", [f.read_text() for f in files])


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """moto's S3 on loopback, with one bucket; "127.0.0.1:PORT"."""
    try:
        import moto.server  # noqa: F401
        import obstore  # noqa: F401
    except ImportError as error:
        cannot(f"object stores are tested with moto[server] and obstore: {error}")
    with s3_server("bucket") as target:
        yield target


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Our proxy before it, and the environment that leads there; `proxy.place` is a prefix of its own."""
    with proxied(s3) as made:
        set_environment(made.url, monkeypatch.setenv, monkeypatch.delenv)
        yield made


@pytest.fixture(scope="session")
def warm_path() -> Iterator[str]:
    """A PATH on which `actstore` and `trainer` start at once."""
    with warm_commands() as folder:
        yield f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
