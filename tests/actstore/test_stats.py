from __future__ import annotations

import numpy as np
import pytest

from actstore.errors import FormatError
from actstore.stats import dump_moments, merge, moments_of, no_rows, parse_moments


def test_merged_moments_equal_those_of_all_rows():
    x = np.random.default_rng(0).normal(5, 3, (10_000, 7)).astype(np.float32)
    total = no_rows(7)
    for part in np.array_split(x, 7):
        total = merge(total, moments_of(part))
    np.testing.assert_allclose(total.mean, x.astype(float).mean(0), rtol=1e-12)
    assert total.total_variance == pytest.approx(x.astype(float).var(0).sum(), rel=1e-12)
    assert total.mean_norm == pytest.approx(np.linalg.norm(x.astype(float), axis=1).mean(), rel=1e-12)
    assert (total.max_abs == np.abs(x).max(0)).all() and total.rows == 10_000


def test_a_large_mean_does_not_cost_the_variance():
    x = np.random.default_rng(0).normal(25_000, 1, (5000, 2))
    assert moments_of(x).total_variance == pytest.approx(x.var(0).sum(), rel=1e-9)


def test_moments_round_trip_bit_for_bit_and_refuse_others():
    m = moments_of(np.random.default_rng(1).normal(size=(10, 3)))
    value = dump_moments(m)
    again = parse_moments(value, 3, "x")
    assert dump_moments(again) == value
    for bad in ({**value, "mean": value["mean"][:-16]}, {**value, "extra": 1}, {**value, "rows": True}, {}):
        with pytest.raises(FormatError):
            parse_moments(bad, 3, "x")
