"""Promise 1: what was reported committed survives power loss, a full disk and failing calls.

Each piece has a control with a protection taken away, which must lose rows; `kept` asserts that too.
"""

from __future__ import annotations

from harness.promise import kept


def test_power_losses_of_a_real_file_system_take_nothing_committed():
    result = kept("ext4", 150)
    assert result["controls"]["fsync off"]["bad"]


def test_no_disk_state_that_a_power_loss_may_leave_lacks_committed_rows():
    result = kept("disk_states", 2000)
    assert set(result["controls"]) == {"fsync ignored", "folder fsync ignored"}


def test_a_full_disk_is_named_and_takes_nothing_committed():
    result = kept("sizes", 60)
    assert result["details"]["full"] >= 15
