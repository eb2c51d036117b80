"""Plans: what they say is what a capture then takes; a budget is kept."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from helpers import TINY

from actstore import forecast as forecasting
from actstore.capture import Progress, StoppedError, capture
from actstore.catalog import open_store
from actstore.errors import UsageError
from actstore.forecast import Budget, forecast, parse_budget

SOON = datetime.now() + timedelta(hours=8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(forecasting, "CALIBRATION_SECONDS", 0.05)
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)


def files(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


@pytest.mark.parametrize("text", ["", "8", "h", "-1h", "0h", "8 weeks", "1e3GB", "500gb", "nanh", "0GB"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match="no budget"):
        parse_budget(text)


BUDGETS = {"90m": Budget(seconds=5400), "1.5h": Budget(seconds=5400), "2 TB": Budget(bytes=2e12), "1GiB": Budget(bytes=2**30)}


@pytest.mark.parametrize("text, budget", BUDGETS.items())
def test_budgets(text, budget):
    assert parse_budget(text) == budget


def test_without_rows_the_corpus_is_counted_and_nothing_is_left_behind(toy_request):
    request, counted = toy_request(), []
    found = forecast(request, SOON, on_rows=counted.append)
    assert not request.stores.exists() or not files(request.stores)
    store = open_store(capture(request)[0], request.stores)
    assert found.plan.rows == store.rows == sum(counted) and found.calibration is None and found.seconds is None
    assert found.plan.stores[0]["digest"] == store.digest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_bytes_of_each_dtype_are_those_on_disk(toy_request, dtype):
    planned = forecast(toy_request(), SOON).bytes_by_dtype[dtype]
    request = toy_request(dtype=dtype)
    store = open_store(capture(request)[0], request.stores)
    written = sum(p.stat().st_size for p in store.path.rglob("c.*"))
    assert written <= planned < 1.6 * written  # records, and room for the exact rows of int8


def test_a_budget_of_bytes_gives_whole_row_groups_that_fit_and_no_more(toy_request):
    both = ("blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post")  # one is four times as wide as the other
    for hooks in (both[:1], both):
        request = toy_request(hooks=hooks)
        found = forecast(request, SOON, Budget(bytes=3e6))
        assert found.request.rows == found.plan.rows and found.plan.rows % 1024 == 0
        assert found.plan.needed_bytes <= 3e6 < found.plan.needed_bytes * (1 + 2048 / found.plan.rows)
    with pytest.raises(UsageError, match="does not hold 1024 rows: it takes"):
        forecast(toy_request(), SOON, Budget(bytes=1000))
    with pytest.raises(UsageError, match="together"):
        forecast(toy_request(rows=10), SOON, Budget(bytes=3e6))


def test_a_budget_smaller_than_a_full_row_group_gives_a_smaller_one(toy_request, monkeypatch):
    monkeypatch.undo()
    found = forecast(toy_request(), SOON, Budget(bytes=300e3))
    assert found.plan.rows == 2048 and found.plan.needed_bytes <= 300e3 < 2 * found.plan.needed_bytes


def test_calibration_measures_model_and_disk_and_leaves_nothing_behind(toy_request):
    request = toy_request(rows=5000)
    found = forecast(request, SOON, calibrated=True)
    calibration = found.calibration
    assert calibration.rows_per_s == min(calibration.model_rows_per_s, calibration.disk_rows_per_s) > 0
    assert calibration.peak_bytes > 10e6 and calibration.device_peak_bytes == 0
    assert found.seconds == pytest.approx(calibration.load_s + 5000 / calibration.rows_per_s)
    assert found.rows_until == 5000 and not files(request.stores)
    late = forecast(request, datetime.now() + timedelta(milliseconds=1), calibrated=True)  # less than the start takes
    assert late.rows_until < 5000


def test_a_budget_of_time_is_the_measured_rate_times_the_time(toy_request):
    found = forecast(toy_request(), SOON, Budget(seconds=3600))
    rate = found.calibration.rows_per_s
    assert 0 <= rate * (3600 - found.calibration.load_s) - found.plan.rows < 1025 and found.plan.rows % 1024 == 0


def test_what_is_there_already_is_not_counted_again(toy_request):
    request = toy_request(rows=5000)
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        capture(request, Progress(stop=lambda: next(asked)))
    assert forecast(request, SOON).plan.stores[0]["committed"] == 2
    capture(request)
    found = forecast(request, SOON)
    assert found.plan.stores == [] and found.plan.needed_bytes == 0
    assert forecast(toy_request(rows=4096), SOON).plan.stores[0]["linked"] == 4


def test_a_real_model_is_calibrated_too(toy_request, tiny_corpus):
    request = toy_request(model=str(TINY), backend="auto", corpus=(tiny_corpus,), hooks=("blocks.2.hook_resid_pre",), rows=4096)
    found = forecast(request, SOON, calibrated=True)
    assert found.plan.memory_bytes < found.calibration.peak_bytes < 64e9 and found.calibration.load_s > 0
    assert os.path.exists(request.stores) and not files(request.stores)
