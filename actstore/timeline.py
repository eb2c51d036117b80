"""Where the time of a capture goes: seconds by name, from the model's thread and from the writer's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["read", "load", "model", "convert", "wait", "digest", "write"]
BESIDE: tuple[Part, ...] = ("digest", "write")  # in the writer's thread, beside the model


@dataclass(slots=True)
class Timeline:
    """Seconds of wall time by what they were spent on.

    The model's thread: `read` waits for the corpus, `load` loads weights, `model` runs it, `convert` brings rows into the
    stored dtype and into their row group, `wait` stands before a full queue or for other workers. The writer's thread,
    at the same time: `digest` (int8, checksums, statistics) and `write` (files and fsync).
    """

    seconds: dict[Part, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time of the block under a name; a name belongs to one thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """Return each part as a fraction of the wall time since the start; `other` is the rest of the model's thread.

        Example:
            >>> line = Timeline({"model": 2.0, "write": 1.0}, start=time.perf_counter() - 4.0)
            >>> {name: round(share, 2) for name, share in line.shares().items()}
            {'model': 0.5, 'write': 0.25, 'other': 0.5}
        """
        wall = time.perf_counter() - self.start
        shares: dict[str, float] = {name: seconds / wall for name, seconds in self.seconds.items()}
        return shares | {"other": max(0.0, 1.0 - sum(share for name, share in shares.items() if name not in BESIDE))}
