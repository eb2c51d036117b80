"""Parsers under fire: see `harness.fuzz`."""

from __future__ import annotations

from harness import fuzz


def test_five_thousand_malformed_inputs_for_each_parser(tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * fuzz.D_MODEL * 4)
    results = fuzz.run(tmp_path, 5000)
    assert len(results) == 9
    for name, result in results.items():
        assert not result["failures"], (name, result["failures"][:3])
        assert result["inputs"] == 5000 and result["refused"] > 1500, name


def test_control_a_planted_bug_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * fuzz.D_MODEL * 4)
    assert fuzz.run(tmp_path, 200, control=True)["planted"]["failures"]
