"""Promise 4: any changed, missing, extra, swapped or foreign byte is reported, and no damaged byte is ever read out."""

from __future__ import annotations

import pytest
from harness import damage, stores


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """The harness sets this itself; here it is put back after the test."""
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", stores.GROUP_ROWS * stores.D_MODEL * 4)


def test_ten_thousand_damages_are_found_and_none_is_served(tmp_path):
    """Every byte of every small file, every file, every pair of files, then random ones (`python -m harness.damage`)."""
    tally = damage.run(tmp_path, 10_500)
    assert tally.damages >= 10_000 and tally.by_kind["flip"] > 9000 and len(tally.by_kind) == 13
    assert not tally.not_found and not tally.served


def test_control_without_digests_the_harness_sees_undetected_damage(tmp_path):
    with damage.digests_off():
        tally = damage.run(tmp_path, 200, finite_kinds=False)
    assert len(tally.not_found) > 50 and len(tally.served) > 20
