"""Promise 2: a store is sealed and whole or visibly unsealed, whatever was killed; and all writing passes one door."""

from __future__ import annotations

from harness.promise import kept


def test_killed_at_every_step_no_third_state_opens():
    result = kept("kills", 2000)
    assert all(job["killed"] >= job["steps"] for name, job in result["details"].items() if "two" not in name)


def test_every_call_that_changes_the_disk_is_announced_and_can_fail():
    result = kept("traced", 100)
    assert result["details"]["calls made to fail"] >= 4
