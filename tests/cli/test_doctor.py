"""`actstore doctor` on whole, damaged and unsealed stores, full and read-only disks, with and without the hub."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata

import pytest
from actstore_cli.actstore import main
from click.testing import CliRunner
from helpers import cannot, flip, writable

from actstore import doctor
from actstore.capture import Progress, StoppedError, capture


def asked(stores, *more):
    result = CliRunner().invoke(main, ["doctor", "--stores", str(stores), *more])
    return result, {check["name"]: check for check in json.loads(result.stdout)["checks"]} if "--json" in more else {}


def test_a_healthy_machine_is_ok_and_nothing_is_left_behind(toy_store, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stores = toy_store.path.parent
    before = sorted(p.name for p in stores.iterdir())
    result, checks = asked(stores, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["ok"], result.output
    assert checks["locks"]["text"] == "flock works" and checks["hard links"]["text"] == "work"
    assert checks["torch"]["text"] == metadata.version("torch") and "MB/s" in checks["write, sync, rename"]["text"]
    assert {"python", "cpu", "threads", "memory", "cuda", "kernel cache", "disk", "hub"} <= set(checks) | {"cuda"}
    assert "offline" in checks["hub"]["text"] and "a token is there" in checks["hub"]["text"]
    assert "hf_secret" not in result.output and sorted(p.name for p in stores.iterdir()) == before
    assert checks["stores"]["text"].startswith("1 whole")


def test_a_damaged_store_is_exit_1_and_says_what_mends_it(toy_store):
    chunk = writable(toy_store) / "acts" / "c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    result, _ = asked(toy_store.path.parent)
    assert result.exit_code == 1 and f"`actstore repair {toy_store.digest[:12]}`" in result.stdout
    flip(toy_store.path / "manifest.json", 40)
    assert asked(toy_store.path.parent)[0].exit_code == 1


def test_an_unsealed_store_is_a_warning(toy_request):
    request = toy_request()
    with pytest.raises(StoppedError):
        capture(request, Progress(stop=lambda: True))
    result, checks = asked(request.stores, "--json")
    (unsealed,) = [check for name, check in checks.items() if name.startswith("store ")]
    assert result.exit_code == 0 and unsealed["state"] == "warn" and "actstore gc" in unsealed["do"]


def test_a_disk_without_room_is_exit_6(tmp_path):
    full = tmp_path / "small"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", full], capture_output=True, check=False).returncode:
        cannot("a tmpfs cannot be mounted here")
    try:
        checks = list(doctor.check_folder(full / "stores"))
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", full], check=True)
    assert [(c.state, c.code) for c in checks] == [("warn", 0), ("fail", 6)] and "make space" in checks[1].do


def test_a_package_too_old_and_one_missing_are_named_with_their_pip_line(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy>=99", "no-such-package>=2", "no-extra>=1; extra == 'x'"])
    found = {check.name: check for check in doctor.check_versions()}
    assert found["numpy"].state == "fail" and found["numpy"].do == "pip install 'numpy>=99'" and found["numpy"].code == 2
    assert "not installed" in found["no-such-package"].text and "no-extra" not in found


def test_a_hub_out_of_reach_is_a_warning(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (check,) = doctor.check_hub()
    assert check.state == "warn" and "does not answer" in check.text and "HF_HUB_OFFLINE=1" in check.do
