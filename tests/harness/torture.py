"""Every piece of the harness at a size: `make torture` runs the long form and writes docs/reliability.md's table.

A piece is an entry of `PIECES`; each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report import line_of

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "docs" / "reliability.md"
MAX_SECONDS = 6 * 3600  # a piece that hangs must not take the whole night
BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"


@dataclass(frozen=True)
class Piece:
    """A module of the harness and how many cases it runs in CI and in the long form."""

    module: str
    ci: int
    long: int


PIECES = [
    Piece("kills", 2050, 20_000),
    Piece("disk_states", 2000, 50_000),
    Piece("ext4", 152, 2000),
    Piece("sizes", 64, 1000),
    Piece("faults", 520, 1500),
    Piece("traced", 5, 200),
    Piece("random_kills", 6, 200),
    Piece("training", 70, 400),
    Piece("races", 200, 5000),
    Piece("damage", 8_800, 200_000),
    Piece("fuzz", 5000, 100_000),
    Piece("attacks", 1, 1),
]


def run_piece(module: str, n: int, seed: int = 0) -> dict[str, Any]:
    """Run one piece in a process of its own and return its result.

    Raises: AssertionError: it ended without a result.
    """
    # The repository first: `tests/trainer` would hide the package otherwise.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"harness.{module}", "--n", str(n), "--seed", str(seed), "--json"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=MAX_SECONDS,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert lines, f"harness.{module} ended with {done.returncode} and no result:\n{done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def table_of(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| piece | one case | cases | bad | controls (protection off): bad of run | seconds |", "|---|---|---|---|---|---|"]
    for r in results:
        if r["skipped"]:
            lines.append(f"| {r['piece']} | not run: {r['skipped']} | | | | |")
            continue
        controls = "; ".join(f"{name}: {c['bad']} of {c['n']}" for name, c in r["controls"].items()) or "–"
        lines.append(f"| {r['piece']} | {r['what']} | {r['n']:,} | {r['n_bad']} | {controls} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def write_table(path: Path, table: str) -> None:
    """Put the table between the two marker comments of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, f"{path} has no {BEGIN} … {END}"
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> None:
    """Run the pieces asked for, print each as it ends, write the table where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=["ci", "long"], default="long")
    parser.add_argument("--only", nargs="*", default=[p.module for p in PIECES], help="modules to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the long form, to have it done in less time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="pieces that run at once")
    parser.add_argument("--write", action="store_true", help=f"write the table into {TABLE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object at the end")
    options = parser.parse_args()

    def one(piece: Piece) -> dict[str, Any]:
        n = piece.ci if options.scale == "ci" else max(piece.ci, int(options.share * piece.long))
        print(f"{piece.module}: {n} …", file=sys.stderr, flush=True)
        result = run_piece(piece.module, n, options.seed)
        print(line_of(result), *result["bad"], sep="\n  ", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(one, [piece for piece in PIECES if piece.module in options.only]))
    if options.write:
        write_table(TABLE, table_of(results))
    print(json.dumps({"scale": options.scale, "results": results}) if options.json else table_of(results))
    sys.exit(0 if all(r["ok"] for r in results) else 1)


if __name__ == "__main__":
    main()
