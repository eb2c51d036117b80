"""Carry out all attacks, one forked process each: `PYTHONPATH=tests python -m attacks.run [--only WORD]` prints JSON."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from attacks.builders import ATTACKS
from attacks.cell import CANARY, CONTROLS, Attack, Outcome, Victim, carry_out, prepare
from harness.process import import_numba
from harness.stores import small_groups

VICTIM = """
import sys
from pathlib import Path
from harness.stores import small_groups, tiny_store
from trainer import FitConfig, fit
small_groups()
home = Path(sys.argv[1])
store, twin = (tiny_store(home, seed) for seed in (0, 1))
(result,) = fit(store, FitConfig(n_latents=(8,), k=(2,), batch_size=256, holdout=0.2), home / "runs")
print(store.digest, twin.digest, result.digest)
"""


def make_template(folder: Path) -> dict[str, str]:
    """Make the victim that every attack gets a copy of; in a process of its own, since torch does not survive a fork."""
    made = subprocess.run([sys.executable, "-c", VICTIM, folder], capture_output=True, text=True, check=True)
    (folder / "fleet.toml").write_text("k = 2\nn_latents = 8\n")
    return dict(zip(("store", "twin", "run"), made.stdout.split(), strict=True))


def load_everything() -> None:
    """Import what the commands import lazily, so that importing is not counted as an attack's time or memory."""
    import actstore_cli.actstore
    import actstore_cli.trainer  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch._weights_only_unpickler  # noqa: F401

    import trainer.evaluate
    import trainer.fit
    import trainer.formats
    import trainer.loggers
    import trainer.report
    from trainer.architectures import architecture_names, load_architecture

    for name in architecture_names():
        load_architecture(name)
    trainer.formats.format_names(reading=True)
    import_numba()


def controls() -> list[Attack]:
    """Return attacks on careless programs; each must be complained about, or the cell sees nothing."""

    def lure(victim: Victim) -> None:
        from attacks.builders import link, pickled

        link(victim.home / "link", victim)
        pickled(victim.home / "pickle", victim)

    return [Attack(f"control: {name}", lure, "FormatError", 7, (name, "link", "pickle")) for name in CONTROLS]


def run(only: str = "") -> dict[str, dict[str, object]]:
    """Return by attack its exit code, processor time, message and what is wrong with it."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        digests = make_template(Path(name) / "template")
        load_everything()
        small_groups()
        gc.collect()
        gc.freeze()  # or the collector of each forked process would copy every page that holds an object
        for attack in [*ATTACKS, *controls()]:
            if only not in attack.name:
                continue
            work = Path(name) / "work"
            work.mkdir()
            outcome: Outcome = carry_out(attack, prepare(Path(name) / "template", work, digests))
            results[attack.name] = {
                "code": outcome.code,
                "cpu_seconds": outcome.cpu_seconds,
                "message": outcome.err[-600:].replace(CANARY, "<secret>"),
                "complaints": outcome.complaints,
            }
            shutil.rmtree(work)
    return results


def main() -> int:
    """Print the results as JSON; exit 0 when nothing but the controls was complained about."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="attacks with this word in their name")
    given = parser.parse_args()
    started = time.monotonic()
    results = run(given.only)
    bad = [name for name, result in results.items() if bool(result["complaints"]) != name.startswith("control")]
    print(
        json.dumps({"attacks": len(results), "wrong": bad, "seconds": round(time.monotonic() - started, 1), "results": results})
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
