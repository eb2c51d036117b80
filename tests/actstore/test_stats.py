from __future__ import annotations

import numpy as np
import pytest

from actstore.errors import FormatError
from actstore.stats import QUANTILES, describe_norms, dump_moments, merge, moments_of, no_rows, norm_bins, parse_moments


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


def test_norm_counts_merge_exactly_in_any_order_and_give_quantiles():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(10_000, 7)) * np.exp(rng.normal(size=(10_000, 1)))).astype(np.float32)
    x[17] = 0
    parts = [moments_of(p) for p in np.array_split(x, 9)]
    forward, backward = no_rows(7), no_rows(7)
    for a, b in zip(parts, parts[::-1], strict=True):
        forward, backward = merge(forward, a), merge(backward, b)
    assert forward.norms == backward.norms == moments_of(x).norms and sum(forward.norms.values()) == 10_000
    norms = np.sort(np.linalg.norm(x.astype(float), axis=1))
    found = describe_norms(forward)
    want = norms[[0, 99, 4999, 9899, 9999]]
    np.testing.assert_allclose([found[name] for name in QUANTILES], want, rtol=0.0111)
    assert found["outlier_severity"] == pytest.approx(np.abs(x).max() / (want[2] / 7**0.5), rel=0.0111)


def test_massive_rows_are_counted_and_weighed():
    x = np.random.default_rng(0).normal(size=(1000, 64))
    x[[3, 500], 5] = 2000
    found = describe_norms(moments_of(x))
    norms = np.linalg.norm(x, axis=1)
    assert found["massive_rows"] == 2 and found["massive_rows_share"] == 0.002
    assert found["massive_norm_share"] == pytest.approx((norms[[3, 500]] ** 2).sum() / (norms**2).sum(), rel=0.03)
    assert found["outlier_severity"] == pytest.approx(2000 / (np.median(norms) / 8), rel=0.0111)
    assert describe_norms(moments_of(np.zeros((4, 2))))["outlier_severity"] == 0


def test_moments_without_norms_still_parse_and_merge_to_not_recorded():
    m = moments_of(np.random.default_rng(1).normal(size=(10, 3)))
    old = {name: value for name, value in dump_moments(m).items() if name != "norms"}
    parsed = parse_moments(old, 3, "x")
    assert parsed.norms is None and {*describe_norms(parsed).values()} == {None} and dump_moments(parsed) == old
    assert merge(parsed, m).norms is None and merge(no_rows(3), parsed).norms is None
    assert merge(no_rows(3), m).norms == m.norms


@pytest.mark.parametrize(
    "norms",
    [
        [], None, 3, {"0": 9}, {"0": 11}, {"0": 10.0}, {"0": True}, {"0": 11, "1": -1}, {"0": 10, "1": 0}, {"01": 10}, {"+1": 10},
        {"4801": 10}, {"-4801": 10}, {"x": 10}, {"9" * 5000: 10}, {" 1": 10}, {"1_0": 10}, {"٣": 10}, {"": 10},
    ],
)  # fmt: skip
def test_norm_counts_that_are_not_are_refused(norms):
    value = dump_moments(moments_of(np.random.default_rng(1).normal(size=(10, 3))))
    assert parse_moments({**value, "norms": {"-3": 4, "7": 6}}, 3, "x").norms == {-3: 4, 7: 6}
    with pytest.raises(FormatError, match="statistics"):
        parse_moments({**value, "norms": norms}, 3, "x")


def test_every_norm_a_store_can_hold_has_a_bin():
    assert norm_bins(np.array([2.0**-149, 3.5e38 * 2.0**10, 0.0])).keys() == {-149 * 32, 4417, -4800}


def test_a_histogram_of_every_norm_there_is_can_be_read_back():
    """2^-126 to 2^127 in one row group: what the writer may write, the strict reader must take."""
    from actstore.digests import canonical_json, parse_json

    moments = moments_of(np.exp2(np.linspace(-126, 127.9, 20_000)).astype(np.float32)[:, None])
    assert len(moments.norms) > 4000
    again = parse_moments(parse_json(canonical_json(dump_moments(moments)), "x"), 1, "x")
    assert again.norms == moments.norms
