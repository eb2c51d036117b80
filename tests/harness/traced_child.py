"""The process that `harness.traced` watches: a capture and a removal, with a log of every announced step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from actstore import durable
from harness import toy


def main(home: Path, log: Path, careless: bool) -> None:
    """Capture, remove; write [[name, path], …] to `log` at the end. `careless` also writes past `durable`: the control."""
    from harness.kills import remove_all

    toy.small_groups()
    steps: list[tuple[str, str]] = []
    durable.step_hook = lambda name, path: steps.append((name, str(path)))
    toy.one_store(home)
    if careless:
        with open(home / "stores" / "note", "w") as file:
            file.write("past durable")
    remove_all(home)
    durable.step_hook = None
    log.write_text(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3)
