"""Promise 8: opening any store, corpus, config or run executes nothing, stays in its folder and within its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from attacks.builders import ATTACKS
from helpers import ROOT


@pytest.fixture(scope="module")
def outcomes():
    """All attacks, each in a forked process with 100 MB and 1 s (`PYTHONPATH=tests python -m attacks.run`)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "attacks.run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)["results"]


def test_there_are_at_least_forty_attacks_of_every_group():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40
    groups = {attack.name.split(":")[0] for attack in ATTACKS}
    stores = {"manifest", "key", "vocabulary", "record", "zarr", "chunk", "special", "link"}
    assert groups == stores | {"table", "run", "safetensors", "corpus", "hash", "TOML", "import", "features"}


@pytest.mark.parametrize("name", [attack.name for attack in ATTACKS])
def test_an_attack_ends_in_exactly_one_of_our_errors(outcomes, name):
    assert not outcomes[name]["complaints"], outcomes[name]


def test_controls_are_complained_about(outcomes):
    """A program that follows links and loads pickles, one that takes memory and one that takes time.

    That the secret file was read shows by its access time too, but only where the mount keeps those.
    """
    seen = {name: " ".join(outcome["complaints"]) for name, outcome in outcomes.items() if name.startswith("control")}
    for fault in ("the secret was printed", "a payload was executed", "made outside/executed"):
        assert fault in seen["control: careless"]
    assert outcomes["control: greedy"]["code"] == 99 and "processor time" in seen["control: slow"]
