"""Promise 7: a fit killed at any step, or with its newest checkpoint damaged, resumes to the same bits."""

from __future__ import annotations

from harness.promise import kept


def test_killed_at_every_step_the_resumed_fit_has_the_same_weights_and_metrics():
    result = kept("training", 70)
    assert result["details"]["steps"] == 50 and result["details"]["damaged checkpoints"] == 3
