"""Promise 3: repeating the command computes only what is missing, and ends at the same content digest."""

from __future__ import annotations

from harness.promise import kept


def test_every_failing_call_has_a_name_and_the_rerun_ends_at_the_same_digest():
    kept("faults", 500)


def test_the_real_command_killed_at_random_times_ends_at_the_same_digest():
    assert kept("random_kills", 6)["details"]["row groups committed before a kill"]
