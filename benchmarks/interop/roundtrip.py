"""Every export through the real peer's loader: same codes, same reconstruction, on real rows; then back through our importer.

    python benchmarks/interop/roundtrip.py --runs RUNS --stores STORES --peer saelens=PYTHON --peer sparsify=PYTHON …

PYTHON is the interpreter of an environment that has the peer (sae-lens; dictionary-learning; eai-sparsify). For each run
and format: export, load with the peer's own loader in its own process (`load_<format>.py`), compare with our codes and
reconstruction of the same rows, then import the folder that the peer saved again and compare once more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from actstore.catalog import open_store
from actstore.errors import FormatError, UsageError
from trainer import Run, find_run, list_runs, load_sae
from trainer.checkpoint import run_sources
from trainer.formats import export_run, import_sae

HERE = Path(__file__).parent


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Return the largest absolute difference, and the largest difference of a row as a share of the row's norm."""
    difference = np.abs(ours.astype(np.float64) - theirs)
    norms = np.linalg.norm(ours.astype(np.float64), axis=1).clip(1e-12)
    return {"abs": float(difference.max()), "rel": float((np.linalg.norm(difference, axis=1) / norms).max())}


def measure(run: Run, name: str, python: str, stores: Path, n_rows: int, work: Path) -> dict[str, object]:
    """Return the differences of one run in one format."""
    sources = run_sources(run, lambda digest: open_store(digest, stores))
    batch = sources.take(np.linspace(0, sources.rows - 1, n_rows).astype(np.int64))
    sae = load_sae(run.path)
    with torch.no_grad():
        codes = sae.encode(batch.x)
        rebuilt = sae.decode(codes, batch.x)
    export_run(run, name, work / "export", lambda: sources)
    np.save(work / "rows.npy", batch.x.numpy())
    command = [python, str(HERE / f"load_{name}.py"), str(work / "export"), str(work / "rows.npy"), str(work / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {' '.join(command)}\n{done.stderr[-3000:]}")
    theirs = {part: np.load(work / "again" / f"{part}.npy") for part in ("codes", "reconstruction")}
    back = import_sae(work / "again", name)
    with torch.no_grad():
        imported = back.encode(batch.x)
        imported_rebuilt = back.decode(imported, batch.x)
    return {
        "run": run.digest[:12], "arch": run.config.arch, "transcoder": run.widths.targets is not None, "format": name,
        "class": done.stdout.strip().splitlines()[-1],
        "rows": n_rows,
        "codes": compared(codes.numpy(), theirs["codes"]),
        "pairs_differ": int(((codes.numpy() != 0) != (theirs["codes"] != 0)).sum()),
        "pairs": int((codes != 0).sum()),
        "reconstruction": compared(rebuilt.numpy(), theirs["reconstruction"]),
        "imported_as": back.config.arch,
        "imported_codes": compared(codes.numpy(), imported.numpy()),
        "imported_pairs_differ": int(((codes != 0) != (imported != 0)).sum()),
        "imported_reconstruction": compared(rebuilt.numpy(), imported_rebuilt.numpy()),
    }  # fmt: skip


def main() -> int:
    """Print a line a run and format, and with --json all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--stores", type=Path, default=Path("stores"))
    parser.add_argument("--run", action="append", help="digest or prefix; default all finished runs")
    parser.add_argument("--store", help="only runs of this store")
    parser.add_argument("--peer", action="append", required=True, metavar="FORMAT=PYTHON")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    given = parser.parse_args()
    runs = [find_run(r, given.runs) for r in given.run] if given.run else list_runs(given.runs)
    runs = [r for r in runs if r.result is not None and r.store.startswith(given.store or "")]
    found = []
    print(f"{'format':20} {'architecture':12} {'run':12}  {'codes abs':>9} {'rel':>8} {'pairs':>13}  {'x̂ abs':>8} {'rel':>8}   "
          f"{'back: abs':>9} {'rel':>8} {'pairs':>5}  {'x̂ rel':>8}  class")  # fmt: skip
    for name, python in (peer.split("=", 1) for peer in given.peer):
        for run in runs:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    numbers = measure(run, name, python, given.stores, given.rows, Path(folder))
                except (UsageError, FormatError) as error:
                    print(f"{name:20} {run.config.arch:12} {run.digest[:12]}  {type(error).__name__}: {error.what}")
                    continue
            found.append(numbers)
            c, x, ic, ix = (numbers[part] for part in ("codes", "reconstruction", "imported_codes", "imported_reconstruction"))
            print(
                f"{name:20} {run.config.arch:12} {run.digest[:12]}  {c['abs']:9.2e} {c['rel']:8.1e} "
                f"{numbers['pairs_differ']:4d} / {numbers['pairs']:6d}  {x['abs']:8.2e} {x['rel']:8.1e}   "
                f"{ic['abs']:9.2e} {ic['rel']:8.1e} {numbers['imported_pairs_differ']:5d}  {ix['rel']:8.1e}  {numbers['class']}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
