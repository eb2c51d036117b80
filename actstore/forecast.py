"""What a capture will take: rows, bytes, memory, and after a few real batches also hours; or the rows a limit allows."""

from __future__ import annotations

import itertools
import math
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np

from actstore.capture import Derivation, derive
from actstore.corpus import ReadReport
from actstore.errors import UsageError
from actstore.key import LocalCorpus, StoredDtype, StoreKey
from actstore.limits import MAX_ROWS, MIN_GROUP_ROWS
from actstore.pipeline import padded, to_stored
from actstore.places import FolderPlace, Place, place_of
from actstore.plan import make_plan
from actstore.progress import Plan
from actstore.request import CaptureRequest, make_keys
from actstore.sequences import Sequences
from actstore.timeline import Timeline
from actstore.writer import StoreWriter, put_rows
from actstore.zarr_array import row_dtype

CALIBRATION_SECONDS = 10.0  # of the model, at least
CALIBRATION_BATCHES = 3  # likewise
SECONDS = {"m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
BYTES = {f"{prefix}B": 1000**i for i, prefix in enumerate(("", "k", "M", "G", "T"))} | {
    f"{prefix}iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)
}


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit: of wall time in seconds, or of disk space in bytes; one of the two."""

    seconds: float | None = None
    bytes: float | None = None


def parse_budget(text: str) -> Budget:
    """Return the limit a text names. Raises: UsageError.

    Example:
        >>> parse_budget("8h").seconds, parse_budget("500GB").bytes
        (28800.0, 500000000000.0)
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]{1,3})", text)
    if match is None or match[2] not in SECONDS | BYTES or not float(match[1]):
        raise UsageError(f"{text!r} is no budget", do=f"give hours or bytes: 8h, 90m, 2d, 500GB ({', '.join(SECONDS | BYTES)})")
    value, unit = float(match[1]), match[2]
    return Budget(seconds=value * SECONDS[unit]) if unit in SECONDS else Budget(bytes=value * BYTES[unit])


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a few real batches took.

    Args:
        model_rows_per_s: of the model with its hook points, one batch after another.
        disk_rows_per_s: of digests and writes, all hook points together; they go on beside the model.
        load_s: seconds to load the weights.
        peak_bytes: most main memory that this process has taken.
        device_peak_bytes: most memory of an accelerator that tensors have taken; 0 on a CPU.
    """

    model_rows_per_s: float
    disk_rows_per_s: float
    load_s: float
    peak_bytes: int
    device_peak_bytes: int

    @property
    def rows_per_s(self) -> float:
        """Rows a second of a capture: of whichever is slower."""
        return min(self.model_rows_per_s, self.disk_rows_per_s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a capture will take.

    Args:
        request: the capture, with the rows that the budget allows.
        plan: rows, bytes and memory.
        bytes_by_dtype: of all its stores, were they stored in each dtype.
        calibration: None unless asked for.
        until: a time of day, for `rows_until`.
        rows_until: rows there by then if it began now; None without calibration.
        seconds: what the missing rows take, loading included; None without calibration.
    """

    request: CaptureRequest
    plan: Plan
    bytes_by_dtype: dict[str, int]
    calibration: Calibration | None
    until: datetime
    rows_until: int | None
    seconds: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the forecast as JSON values."""
        calibration = self.calibration and {**asdict(self.calibration), "rows_per_s": self.calibration.rows_per_s}
        return {
            **asdict(self.plan), "bytes_by_dtype": self.bytes_by_dtype, "calibration": calibration, "seconds": self.seconds,
            "until": self.until.isoformat(), "rows_until": self.rows_until,
        }  # fmt: skip


def forecast(
    request: CaptureRequest, until: datetime, budget: Budget | None = None, calibrated: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Forecast:  # fmt: skip
    """Return what a capture will take; a budget sets its number of rows, in whole row groups.

    Args:
        request: the capture; `rows` must be None with a budget.
        until: for how many rows there will be by then.
        budget: a limit of time (which needs calibration) or of bytes.
        calibrated: load the model and run a few real batches.
        on_rows: called with rows just counted, while the corpus is read.

    Raises: UsageError: neither rows nor a budget for a hub dataset, whose length is not known; both; a budget that holds
        no row group. CorpusError, StoreLocked (while it is captured), DiskFull and the others of `capture`.
    """
    if budget is not None and request.rows is not None:
        raise UsageError("--rows and --budget cannot be given together", do="leave one of them out")
    derived, place = derive(request), place_of(request.stores)
    widths = derived.backend.widths(list(request.hooks))
    timed = calibrated or (budget is not None and budget.seconds is not None)
    if request.rows is None and budget is None and not isinstance(derived.corpus, LocalCorpus):
        raise UsageError("how many rows a hub dataset gives is known only at its end", do="give --rows, or --budget")
    calibration, rows = None, request.rows
    if timed or (rows is None and budget is None):
        with derived.reading(ReadReport()) as sequences:
            calibration = _calibrate(derived, sequences, widths, place) if timed else None
            rows = _counted(sequences, on_rows) if rows is None and budget is None else rows
    if budget is not None:
        rows = _rows_for(budget, derived, widths, calibration)
    assert rows is not None
    request = replace(request, rows=rows if budget is not None else request.rows)
    writers = _writers(make_keys(request, derived.backend, derived.corpus), rows, widths, place)
    sources = [place.sources(writer) for writer in writers]
    open_ones = [i for i, writer in enumerate(writers) if place.sealed_rows(writer.paths.digest) is None]
    for i in open_ones:
        writers[i].look_again()
    plan = make_plan([writers[i] for i in open_ones], [sources[i] for i in open_ones], derived.backend, place.free_bytes(), rows)
    by_dtype = {dtype: _bytes_as(writers, dtype) for dtype in get_args(StoredDtype)}
    missing = max((1 - (s["committed"] + s["linked"]) / s["row_groups"] for s in plan.stores), default=0.0) * rows
    seconds = rows_until = None
    if calibration is not None:
        seconds = calibration.load_s + missing / calibration.rows_per_s if missing else 0.0
        left = max(0.0, (until - datetime.now()).total_seconds() - calibration.load_s)
        rows_until = int(rows - missing + min(missing, left * calibration.rows_per_s))
    return Forecast(request, plan, by_dtype, calibration, until, rows_until, seconds)


def _counted(sequences: Sequences, on_rows: Callable[[int], None]) -> int:
    """Wait for the end of the corpus, telling how far it is; return the rows it gives."""
    told = 0
    while not sequences.finished:
        sequences.wait(sequences.rows_in_batches + 1)
        on_rows(sequences.rows - told)
        told = sequences.rows
    sequences.wait()
    on_rows(sequences.rows - told)
    return sequences.rows


def _writers(keys: list[StoreKey], rows: int, widths: list[int], place: Place) -> list[StoreWriter]:
    return [place.writer(k, rows, width) for k, width in zip(keys, widths, strict=True)]


def _bytes_as(writers: list[StoreWriter], dtype: StoredDtype) -> int:
    stored = [replace(w, key=w.key.model_copy(update={"dtype": dtype})) for w in writers]
    return sum(w.n_groups * w.group_bytes for w in stored)


def _rows_for(budget: Budget, derived: Derivation, widths: list[int], calibration: Calibration | None) -> int:
    """Return the most rows within a budget that are whole row groups of every store. Raises: UsageError: there are none."""

    nowhere = FolderPlace(Path())  # only sizes are asked for

    def share(rows: int) -> float:
        """The part of the budget that so many rows take."""
        if budget.bytes is not None:
            return sum(w.n_groups * w.group_bytes for w in _writers(derived.keys, rows, widths, nowhere)) / budget.bytes
        assert calibration is not None and budget.seconds is not None
        left = budget.seconds - calibration.load_s
        return rows / calibration.rows_per_s / left if left > 0 else math.inf

    unit = max(writer.group_rows for writer in _writers(derived.keys, MAX_ROWS, widths, nowhere))
    if units := int(1 / share(unit)):
        return units * unit
    while unit > MIN_GROUP_ROWS:  # a store of fewer rows has smaller row groups
        unit //= 2
        if share(unit) <= 1:
            return unit
    raise UsageError(f"the budget does not hold {unit} rows: it takes {share(unit):.3g} times as much", do="give more, or --rows")


def _calibrate(derived: Derivation, sequences: Sequences, widths: list[int], place: Place) -> Calibration:
    backend, keys = derived.backend, derived.keys
    hooks, dtypes = [key.hook for key in keys], [row_dtype(key.dtype).name for key in keys]
    began = time.perf_counter()
    backend.prepare(hooks)
    load_s, seconds, done, rows = time.perf_counter() - began, 0.0, 0, []
    sequences.wait(1)
    for i in itertools.count():
        if not sequences.finished:
            sequences.wait(sequences.rows_in_batches + 1)
        at = i % (len(sequences.batches) - 1)  # a small corpus again from its beginning
        tokens, lengths = padded(sequences, *(int(s) for s in sequences.batches[at : at + 2]))
        began = time.perf_counter()
        rows = backend.launch(tokens, lengths, hooks, dtypes)()
        if i:  # the first batch finds everything cold
            seconds, done = seconds + time.perf_counter() - began, done + sum(lengths)
        if i >= CALIBRATION_BATCHES and seconds >= CALIBRATION_SECONDS:
            break
    disk = sum(_seconds_a_row(key, x, width, place) for key, x, width in zip(keys, rows, widths, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Calibration(done / seconds, 1 / disk, load_s, peak, backend.device_peak_bytes())


def _seconds_a_row(key: StoreKey, rows: Any, width: int, place: Place) -> float:
    """Time the commit of one row group of real rows."""
    with place.scratch(key, width) as writer:
        acts = to_stored(np.resize(rows, (writer.rows, width)), key.dtype, key.hook, 0)
        zeros = np.zeros(writer.rows, np.int32)
        began = time.perf_counter()
        put_rows(writer, 0, acts, zeros, zeros, zeros, Timeline())
        return (time.perf_counter() - began) / writer.rows / writer.threads
