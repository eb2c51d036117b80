"""Tiny real stores for the harnesses: captured by the toy backend, a few kilobytes, several row groups."""

from __future__ import annotations

from pathlib import Path

from helpers import words, write_jsonl

import actstore.manifest
from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.reader import Store

D_MODEL = 2
GROUP_ROWS = 1024


def small_groups() -> None:
    """Make row groups as small as the format allows, in this process, so that a tiny store has several."""
    actstore.manifest.MAX_CHUNK_BYTES = GROUP_ROWS * D_MODEL * 4


def tiny_store(folder: Path, seed: int = 0, rows: int = 1500, hook: str = "blocks.0.hook_resid_pre") -> Store:
    """Capture a store of two row groups (the last one padded); another seed gives another corpus of the same size."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_jsonl(folder / f"corpus{seed}.jsonl", words(12, 40, seed))
    request = CaptureRequest(
        model=f"toy:{D_MODEL}", hooks=(hook,), corpus=(corpus,), seq_len=32, backend="toy", stores=folder / "stores", rows=rows
    )
    return open_store(capture(request)[0], folder / "stores")
