"""What the tests of `tests/promises/` share: run a piece at its CI size and hold it to its numbers."""

from __future__ import annotations

import os
from typing import Any

import pytest

from harness.torture import PIECES, run_piece


def kept(module: str, at_least: int) -> dict[str, Any]:
    """Run a piece at its CI size; it must have run that many cases, none bad, every control bad.

    A piece that needs root or a tool skips with its reason; with CI=true in the environment that is a failure.
    """
    (n,) = [piece.ci for piece in PIECES if piece.module == module]
    result = run_piece(module, n)
    if result["skipped"]:
        assert os.environ.get("CI") != "true", result["skipped"]
        pytest.skip(result["skipped"])
    assert not result["bad"], result["bad"]
    assert result["n"] >= at_least, result
    assert all(control["bad"] for control in result["controls"].values()), result["controls"]
    return result
