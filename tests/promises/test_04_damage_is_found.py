"""Promise 4: any changed, missing, extra, swapped or foreign byte is reported, and no damaged byte is ever read out."""

from __future__ import annotations

from harness.promise import kept


def test_ten_thousand_damages_are_found_and_none_is_served():
    """Every byte of every small file, every file, every pair of files, then random ones."""
    result = kept("damage", 10_000)
    kinds = result["details"]["by kind"]
    assert kinds["flip"] > 9000 and len(kinds) == 9
    assert {"digests off: not found", "digests off: served"} == set(result["controls"])
