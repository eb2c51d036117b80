"""What a capture tells its caller while it runs, and asks; the caller prints, the library does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actstore.corpus import ReadReport
from actstore.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture will write.

    Args:
        rows: rows of each store.
        stores: for each hook point its store digest, d_model, dtype, row groups in all, committed already and shared
            with another store, and bytes still to write.
        needed_bytes: bytes still to write in all.
        free_bytes: bytes free where the stores lie; None in a bucket.
        memory_bytes: memory for weights, row groups on their way to the disk, and token ids; the weights count where
            the model runs in main memory. The runtime and the model's activations come on top.
        available_bytes: memory that this machine can give now; None where it does not say.
        device_bytes: weights in an accelerator's own memory; 0 on a CPU.
    """

    rows: int
    stores: list[dict[str, Any]]
    needed_bytes: int
    free_bytes: int | None
    memory_bytes: int
    available_bytes: int | None
    device_bytes: int = 0


class StoppedError(Exception):
    """The capture was asked to stop, and has: what was begun is committed. No error: its user wanted it."""


@dataclass(slots=True)
class Progress:
    """Callbacks of one capture; each does nothing unless it is given.

    Args:
        on_plan: called once, before the model is loaded.
        on_corpus: called once, when the corpus has been read.
        on_rows: called with the rows just computed, in every batch; also with rows found committed or linked.
        on_commit: called in the writer's thread after every commit.
        on_note: called with a line worth telling.
        stop: asked before each row group is begun; True ends the capture there with StoppedError.
        timeline: where the time goes.
    """

    on_plan: Callable[[Plan], None] = field(default=lambda plan: None)
    on_corpus: Callable[[ReadReport], None] = field(default=lambda report: None)
    on_rows: Callable[[int], None] = field(default=lambda rows: None)
    on_commit: Callable[[], None] = field(default=lambda: None)
    on_note: Callable[[str], None] = field(default=lambda line: None)
    stop: Callable[[], bool] = field(default=lambda: False)
    timeline: Timeline = field(default_factory=Timeline)
