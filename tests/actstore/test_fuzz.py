"""Parsers under fire: nine of them, each with 5,000 malformed inputs of its own kind; see `harness.fuzz`."""

from __future__ import annotations

from harness.promise import kept


def test_five_thousand_malformed_inputs_for_each_parser():
    parsers = kept("fuzz", 45_000)["details"]
    assert len(parsers) == 9
    for name, result in parsers.items():
        assert result["inputs"] == 5000 and result["refused"] > 1500, name
