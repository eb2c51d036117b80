"""One pass of the model: batches filled by tokens, memory that runs out, work that is not done twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, words, write_jsonl

from actstore.backends import OutOfMemoryError
from actstore.backends.toy import ToyBackend
from actstore.capture import CaptureRequest, Progress, capture
from actstore.catalog import open_store
from actstore.errors import UsageError
from actstore.reader import Store
from actstore.timeline import BESIDE


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


@pytest.fixture
def launched(monkeypatch) -> list[tuple[int, int]]:
    """The shape of each batch that the toy model was given."""
    shapes: list[tuple[int, int]] = []
    real = ToyBackend.launch

    def launch(self, tokens, lengths, hooks, dtypes):
        shapes.append(tokens.shape)
        return real(self, tokens, lengths, hooks, dtypes)

    monkeypatch.setattr(ToyBackend, "launch", launch)
    return shapes


def captured(request: CaptureRequest, progress: Progress | None = None) -> Store:
    return open_store(capture(request, progress)[0], request.stores)


def test_batches_are_filled_by_tokens_not_by_documents(toy_request, make_corpus, launched):
    """Documents of 3 to 300 tokens: a batch takes as many as its tokens allow, padding included, and nearly fills up."""
    corpus = make_corpus([w[: 3 + 7 * i % 300] for i, w in enumerate(words(300, 80))], "uneven.jsonl")
    captured(toy_request(corpus=(corpus,), packing="truncate", seq_len=512, batch_tokens=2048))
    sizes = [n * longest for n, longest in launched]
    assert max(sizes) <= 2048 and np.mean(sizes[:-1]) > 0.7 * 2048


def test_each_batch_runs_once_for_all_hook_points_and_row_groups(toy_request, launched):
    hooks = ("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post")  # of different row groups
    captured(toy_request(hooks=hooks, rows=5000, batch_tokens=320))
    assert len(launched) == -(-5000 // 320)


def test_out_of_memory_halves_the_batch_says_so_and_changes_nothing_else(toy_request, monkeypatch, tmp_path):
    real = ToyBackend.launch

    def small(self, tokens, lengths, hooks, dtypes):
        if len(tokens) > 3:
            raise OutOfMemoryError("no memory for more than 3 sequences")
        return real(self, tokens, lengths, hooks, dtypes)

    plain = captured(toy_request(stores=tmp_path / "plain", batch_tokens=320))
    monkeypatch.setattr(ToyBackend, "launch", small)
    notes: list[str] = []
    store = captured(toy_request(batch_tokens=320), Progress(on_note=notes.append))
    assert store.content_digest == plain.content_digest
    assert [note.partition(":")[0] for note in notes] == [
        "cpu is out of memory for 10 sequences at once", "cpu is out of memory for 5 sequences at once",
    ]  # fmt: skip


def test_a_single_sequence_that_does_not_fit_is_the_end(toy_request, monkeypatch):
    def never(*args):
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(ToyBackend, "launch", never)
    with pytest.raises(UsageError, match="single sequence"):
        capture(toy_request())


def test_a_real_allocation_that_fails_is_survived(tmp_path, monkeypatch):
    """In a process whose address space is too small for the batch asked for, torch's own allocator fails."""
    monkeypatch.undo()  # that process has row groups of the usual size
    corpus = write_jsonl(tmp_path / "corpus.jsonl", words(400, 60))
    code = f"""if True:
        import json, resource
        from pathlib import Path
        from actstore.backends.transformers import TransformersBackend
        from actstore.capture import CaptureRequest, Progress, capture
        prepare, notes = TransformersBackend.prepare, []
        def limited(self, hooks):
            prepare(self, hooks)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20), -1))
        TransformersBackend.prepare = limited
        request = CaptureRequest({str(TINY)!r}, ("blocks.2.hook_resid_pre",), (Path({str(corpus)!r}),), rows=20_000,
            batch_tokens=20_000, device="cpu", stores=Path({str(tmp_path)!r}))
        (digest,) = capture(request, Progress(on_note=notes.append))
        print(json.dumps([digest, notes]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    digest, notes = json.loads(done.stdout)
    assert notes and all("out of memory" in note for note in notes)
    assert open_store(digest, tmp_path).rows == 20_000


def test_the_timeline_accounts_for_the_time(toy_request):
    progress = Progress()
    store = captured(toy_request(), progress)
    shares = progress.timeline.shares()
    assert set(shares) == {"read", "load", "model", "convert", "wait", "digest", "write", "other"}
    assert sum(share for name, share in shares.items() if name not in BESIDE) == pytest.approx(1, abs=1e-6)
    assert shares["write"] > 0 < shares["digest"]
    assert set(store.manifest.provenance["timeline"]) == set(shares)


def test_the_model_waits_for_no_disk_and_no_more_than_the_queue_is_held(toy_request, monkeypatch):
    """While the first row group is stuck in the disk, the model computes until the queue is full, and no further."""
    from actstore import pipeline

    real, seen = pipeline.put_rows, []

    def slow(*arguments):
        first, deadline = not seen, time.monotonic() + 30
        seen.append(len(computed))
        while first and len(computed) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3 if first else 0.02)  # time for more, if there were room
        real(*arguments)

    computed: list[int] = []
    monkeypatch.setattr(pipeline, "put_rows", slow)
    rows = 1024 * 10
    corpus = write_jsonl(Path(toy_request().corpus[0]).parent / "long.jsonl", words(400))
    captured(toy_request(corpus=(corpus,), rows=rows, batch_tokens=1024), Progress(on_rows=computed.append))
    # The first is written while three more are computed: two queued, and one that waits to be.
    assert all(n <= i + pipeline.QUEUED_GROUPS + 2 for i, n in enumerate(seen)) and max(np.diff([0, *seen])) >= 1
    assert seen[1] >= 3
