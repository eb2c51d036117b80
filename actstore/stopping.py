"""When a capture that runs for hours is to stop: at a time of day, or at a signal; always between two row groups."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from types import FrameType

from actstore.errors import UsageError
from actstore.progress import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1 is what `sbatch --signal=B:USR1@120` sends before the time is up


def parse_time(text: str, now: datetime) -> datetime:
    """Return the next moment a text names: "08:00" (local time), or an ISO date and time.

    Raises: UsageError: neither of the two, or in the past.

    Example:
        >>> parse_time("08:00", datetime(2026, 11, 23, 22, 30)).isoformat()
        '2026-11-24T08:00:00'
    """
    try:
        if "T" in text or " " in text:
            when = datetime.fromisoformat(text)
        else:
            clock = datetime.strptime(text, "%H:%M").time()
            when = datetime.combine(now.date(), clock)
            when += timedelta(days=1) if when <= now else timedelta()
    except ValueError as error:
        raise UsageError(f"{text!r} is not a time", do="give 08:00, or 2026-11-24T08:00") from error
    if when.tzinfo is not None:
        when = datetime.fromtimestamp(when.timestamp())
    if when <= now:
        raise UsageError(f"{text} is in the past")
    return when


class Stopper:
    """Asked before each unit of work whether to begin it. Not once the deadline is nearer than the last unit took.

    Args:
        until: local time at which all is to be on disk, or None.
        say: called with one line when a signal arrives.
    """

    def __init__(self, until: datetime | None, say: Callable[[str], None] = lambda line: None) -> None:
        self.until, self._say = until, say
        self.signal: signal.Signals | None = None
        self._asked: float | None = None
        self._longest = 0.0

    def __call__(self) -> bool:
        """Return whether to stop here."""
        now = time.monotonic()
        if self._asked is not None:
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        late = self.until is not None and datetime.now() + timedelta(seconds=self._longest) >= self.until
        return late or self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 as a request to stop at the next row group; a second SIGTERM acts as before.

        Raises: StoppedError: at the signal itself, while no row group has been begun.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def hear(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            signal.signal(signal.SIGTERM, before[signal.SIGTERM])
            if self._asked is None:
                raise StoppedError
            self._say(f"{self.signal.name}: the row groups in hand are finished first")

        try:
            for number in SIGNALS:
                signal.signal(number, hear)
        except ValueError:  # not in the main thread: nothing is sent to it
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
