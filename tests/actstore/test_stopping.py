"""A capture that is to stop does so between row groups: at a time of day, or at a signal."""

from __future__ import annotations

import signal
import time
from datetime import datetime, timedelta

import pytest

from actstore.capture import Progress, StoppedError, capture
from actstore.catalog import list_stores, open_store
from actstore.errors import UsageError
from actstore.stopping import Stopper, parse_time

NOW = datetime(2026, 11, 23, 22, 30)


@pytest.mark.parametrize(
    "text, when",
    [
        ("23:00", datetime(2026, 11, 23, 23)),
        ("08:00", datetime(2026, 11, 24, 8)),
        ("22:30", datetime(2026, 11, 24, 22, 30)),
        ("2026-12-01T08:00", datetime(2026, 12, 1, 8)),
        ("2026-12-01 08:00", datetime(2026, 12, 1, 8)),
    ],
)
def test_times(text, when):
    assert parse_time(text, NOW) == when


@pytest.mark.parametrize("text", ["", "8", "25:00", "08:60", "tomorrow", "2026-11-23T22:00", "2026-13-01T08:00"])
def test_what_is_no_time_to_come_is_refused(text):
    with pytest.raises(UsageError):
        parse_time(text, NOW)


def test_a_time_with_a_zone_is_brought_to_this_one():
    zoned = (datetime.now().astimezone() + timedelta(hours=1)).isoformat()
    assert abs((parse_time(zoned, datetime.now()) - datetime.now()).total_seconds() - 3600) < 5


def test_it_stops_once_the_longest_row_group_took_longer_than_what_is_left(monkeypatch):
    """Row groups of 10, 30 and 10 s, ...: with 25 s left, one as long as the longest would end too late."""
    begin, now = datetime.now(), [0.0]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return begin + timedelta(seconds=now[0])

    monkeypatch.setattr("actstore.stopping.datetime", Clock)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop, asked = Stopper(begin + timedelta(seconds=85)), []
    for took in (10, 30, 10, 10, 10):
        asked.append(stop())
        now[0] += took
    assert asked == [False, False, False, False, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_question_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    said: list[str] = []
    stop = Stopper(None, said.append)
    with stop.listening():
        assert not stop()
        signal.raise_signal(number)
        assert stop() and stop.signal == number and number.name in said[0]
    assert signal.getsignal(number) == before


def test_a_signal_before_the_first_row_group_stops_at_once():
    with pytest.raises(StoppedError), Stopper(None).listening():
        signal.raise_signal(signal.SIGUSR1)


def test_a_stopped_capture_keeps_what_it_began_and_goes_on_to_the_same_store(toy_request, tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)
    request = toy_request(rows=5000, batch_tokens=320)
    asked, committed = iter([False, False, False, True]), []
    with pytest.raises(StoppedError):
        capture(request, Progress(stop=lambda: next(asked), on_commit=lambda: committed.append(1)))
    (line,) = list_stores(request.stores)
    assert not line.sealed and line.committed == len(committed) == 3
    (digest,) = capture(request)
    alone = toy_request(rows=5000, batch_tokens=320, stores=tmp_path / "alone")
    assert open_store(digest, request.stores).content_digest == open_store(capture(alone)[0], alone.stores).content_digest
