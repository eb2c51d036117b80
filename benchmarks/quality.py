"""Our recipes against the peers': same rows in the same order, same n, k and number of rows; each with its own defaults.

    python benchmarks/quality.py STORES HASH --model FOLDER --peer dictionary_learning=/venv/bin/python \\
        --peer sparsify=/venv/bin/python --peer saelens=/venv2/bin/python --table docs/quality.md --picture docs/quality.png

Every finished training is a line of --results: the command goes on where it was interrupted. Position 0 of each sequence
is left out; 5 % of the documents are held out. Of the held-out rows:

    fvu         Σ‖x - x̂‖² / Σ‖x - mean‖²
    fvu_plain   the same without massive rows (norm over 10 medians), which are few but most of the variance
    l0          active latents a row, in the library's inference mode
    dead        share of latents active on none of them, nor on the first 100,000 training rows
    recovered   (CE mean-ablated - CE spliced) / (CE mean-ablated - CE), nats of the next token, spliced in at the hook point
    seconds     of all training steps, with what a library estimates before the first one

In the peers' favour, as their defaults are for longer runs: a latent is dead after a tenth of the rows; warm-up over a
twentieth, decay over the last fifth; dictionary_learning's and SAELens's thresholds average over a tenth of the steps;
SAELens scales its inputs, sparsify has AuxK of 1/32 (its default is none).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from actstore.catalog import open_store
from actstore.reader import Store
from trainer.batches import split_rows
from trainer.config import FitConfig, resolve
from trainer.order import make_order
from trainer.sources import Sources

PEERS = Path(__file__).parent / "peers"
HOLDOUT = 0.05
TRAINERS = {
    "actstore topk": ("ours", "topk"), "actstore batchtopk": ("ours", "batchtopk"),
    "dictionary_learning TopK": ("dictionary_learning", "topk"),
    "dictionary_learning BatchTopK": ("dictionary_learning", "batchtopk"),
    "sparsify Adam": ("sparsify", "adam"), "sparsify Signum": ("sparsify", "signum"),
    "SAELens TopK": ("saelens", "topk"), "SAELens BatchTopK": ("saelens", "batchtopk"),
}  # fmt: skip


def write_rows(store: Store, rows: int, batch_size: int, folder: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Write train.npy, held.npy (float32) and order.npy (which training row comes when); return the held-out rows' numbers."""
    config = FitConfig(batch_size=batch_size, rows=rows, skip_positions=1, holdout=HOLDOUT)
    split = split_rows(store, config)
    (sae,) = resolve(config, store.d_model, split.n_train)
    order = make_order(split.n_train, Sources((store,)).row_bytes, sae, store.manifest.group_rows)
    epochs = -(-rows // split.n_train)
    found = [order.rows_of_window(e, w) for e in range(epochs) for w in range(order.n_windows)]
    np.save(folder / "order.npy", np.concatenate(found)[:rows])
    train = np.arange(store.rows) if split.train is None else np.asarray(split.train)
    np.save(folder / "train.npy", np.asarray(store.take("acts", train), np.float32))
    np.save(folder / "held.npy", np.asarray(store.take("acts", split.held_out), np.float32))
    return split.held_out


def fvus(x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, float]:
    """Return the fraction of variance unexplained of all rows, and of those that are not massive."""
    norms = x.norm(dim=1)
    plain = norms < 10 * norms.median()

    def fvu(kept: torch.Tensor) -> float:
        a, b = x[kept].double(), x_hat[kept].double()
        return float((a - b).square().sum() / (a - a.mean(0)).square().sum())

    return {"fvu": fvu(torch.ones_like(plain)), "fvu_plain": fvu(plain)}


class Splice:
    """The model's loss with other rows at the hook point, on sequences that hold held-out rows.

    Args:
        store: of blocks.L.hook_resid_pre.
        held: its held-out rows, (n,) int64 sorted.
        model: folder of a transformers model.
        sequences: at most so many.
        device: where the model runs.
    """

    def __init__(self, store: Store, held: np.ndarray[Any, np.dtype[np.int64]], model: Path, sequences: int, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
        layer = int(store.key.hook.split(".")[1])
        self.block = self.model.get_submodule(f"model.layers.{layer}")
        starts = np.flatnonzero(store.read("positions", 0, store.rows) == 0)
        ends = np.append(starts[1:], store.rows)
        inside = np.searchsorted(held, ends) - np.searchsorted(held, starts)
        chosen = np.flatnonzero(inside >= 32)[:sequences]
        self.parts = []
        for i in chosen:
            mine = slice(np.searchsorted(held, starts[i]), np.searchsorted(held, ends[i]))
            tokens = torch.from_numpy(store.read("tokens", starts[i], ends[i]).astype(np.int64)).to(device)
            self.parts.append((tokens, torch.from_numpy(held[mine] - starts[i]).to(device), mine))
        self.mean = (
            torch.from_numpy(np.asarray(store.take("acts", held), np.float32)).mean(0).to(device)
        )  # all rows' is position 0's
        self.plain, self.ablated = self.loss(None), self.loss("mean")

    @torch.no_grad()
    def loss(self, rows: torch.Tensor | str | None) -> float:
        """Return the mean loss of tokens predicted from held-out rows: as they are, "mean", or these rows in their place."""
        total = count = 0.0
        for tokens, places, mine in self.parts:
            put = None if rows is None else self.mean.expand(len(places), -1) if isinstance(rows, str) else rows[mine]

            def replace(module: Any, args: Any, places: torch.Tensor = places, put: torch.Tensor | None = put) -> Any:
                if put is None:
                    return None
                hidden = args[0].clone()
                hidden[0, places] = put
                return (hidden, *args[1:])

            handle = self.block.register_forward_pre_hook(replace)
            logits = self.model(tokens[None]).logits[0]
            handle.remove()
            at = places[places < len(tokens) - 1]
            total += float(torch.nn.functional.cross_entropy(logits[at], tokens[at + 1], reduction="sum"))
            count += len(at)
        return total / count


def run(job: dict[str, Any], python: str) -> dict[str, Any]:
    """Train one SAE in its own process and environment; return what it printed."""
    command = [python, str(PEERS / f"quality_{job['peer']}.py"), json.dumps(job)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a peer must not import our packages
    if job["device"] == "cpu":
        clean["SPARSIFY_DISABLE_TRITON"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def numbers(options: argparse.Namespace) -> argparse.Namespace:
    """Parse the comma lists."""
    for name in ("n", "k", "seeds"):
        setattr(options, name, [int(part) for part in getattr(options, name).split(",")])
    options.peers = {"ours": sys.executable, **dict(pair.split("=", 1) for pair in options.peer)}
    options.trainers = [name for name in options.trainer or TRAINERS if TRAINERS[name][0] in options.peers]
    return options


def train_all(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Run what is not in the results yet, appending to them."""
    store = open_store(options.hash, options.stores)
    about = {"store": store.digest, "rows": options.rows, "batch_size": options.batch_size}
    wanted = [
        {**about, "trainer": name, "n": n, "k": k, "seed": seed}
        for seed, n, k, name in product(options.seeds, options.n, options.k, options.trainers)
    ]
    left = [job for job in wanted if not any(job.items() <= done.items() for done in results)]
    if not left:
        return
    with tempfile.TemporaryDirectory() as scratch:
        held = write_rows(store, options.rows, options.batch_size, Path(scratch))
        x = torch.from_numpy(np.load(Path(scratch) / "held.npy"))
        splice = Splice(store, held, options.model, options.sequences, options.device) if options.model else None
        for job in tqdm(left, "quality", unit="SAE"):
            peer, kind = TRAINERS[job["trainer"]]
            more = {
                "peer": peer,
                "kind": kind,
                "folder": scratch,
                "stores": str(options.stores),
                "holdout": HOLDOUT,
                "device": options.device,
            }
            try:
                found = run({**job, **more, "threads": options.threads}, options.peers[peer])
            except RuntimeError as error:
                tqdm.write(f"{job['trainer']} n {job['n']} k {job['k']}: {error}", file=sys.stderr)
                continue
            x_hat = torch.from_numpy(np.load(Path(scratch) / "recon.npy"))
            line = {**job, **found, **fvus(x, x_hat)}
            if splice is not None:
                line |= {"ce": splice.plain, "ce_ablated": splice.ablated, "ce_spliced": splice.loss(x_hat.to(options.device))}
                line["recovered"] = (splice.ablated - line["ce_spliced"]) / (splice.ablated - splice.plain)
            results.append(line)
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each (n, k, trainer): (mean, spread) over seeds of each number."""
    found = []
    for n, k, name in sorted(
        {(r["n"], r["k"], r["trainer"]) for r in results}, key=lambda t: (t[0], t[1], list(TRAINERS).index(t[2]))
    ):
        mine = [r for r in results if (r["n"], r["k"], r["trainer"]) == (n, k, name)]
        entry: dict[str, Any] = {"n": n, "k": k, "trainer": name, "seeds": len({r["seed"] for r in mine})}
        for key in ("fvu", "fvu_plain", "l0", "dead", "recovered", "seconds"):
            values = [r[key] for r in mine if key in r]
            entry[key] = (statistics.mean(values), max(values) - min(values)) if values else None
        found.append(entry)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return the summary as Markdown; the best of each (n, k) in bold."""
    lines = [
        "| n | k | trainer | seeds | FVU | FVU without massive rows | L0 | dead | loss recovered | seconds |",
        "|" + " --- |" * 10,
    ]
    for e in found:
        group = [o for o in found if (o["n"], o["k"]) == (e["n"], e["k"])]

        def cell(key: str, form: str, e: dict[str, Any] = e, group: list[dict[str, Any]] = group) -> str:
            if e[key] is None:
                return ""
            text = format(e[key][0], form) + (f" ± {e[key][1] / 2:{form}}" if e["seeds"] > 1 else "")
            best = key.startswith("fvu") and e[key][0] == min(o[key][0] for o in group)
            return f"**{text}**" if best else text

        lines.append(
            f"| {e['n']} | {e['k']} | {e['trainer']} | {e['seeds']} | {cell('fvu', '.4f')} | {cell('fvu_plain', '.4f')} "
            f"| {cell('l0', '.1f')} | {cell('dead', '.2%')} | {cell('recovered', '.4f')} | {cell('seconds', '.0f')} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], out: Path) -> None:
    """Draw L0 against FVU, a panel for each n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({e["n"] for e in found})
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(6.2 * len(sizes), 4.6), squeeze=False)
    for panel, n in zip(panels[0], sizes, strict=True):
        for name in TRAINERS:
            mine = sorted((e["l0"][0], e["fvu_plain"][0]) for e in found if e["n"] == n and e["trainer"] == name)
            if mine:
                ours = name.startswith("actstore")
                panel.plot(*zip(*mine, strict=True), marker="o", lw=2.4 if ours else 1.2, ls="-" if ours else "--", label=name)
        panel.set(title=f"n = {n}", xlabel="L0 (active latents a row)", ylabel="FVU, held out, without massive rows")
        panel.set_xscale("log", base=2)
        ticks = sorted({e["k"] for e in found})
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train what is missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path)
    parser.add_argument("hash")
    parser.add_argument("--model", type=Path, help="transformers folder of the store's model, for the spliced loss")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--trainer", action="append", choices=list(TRAINERS), help="only these  [default: all]")
    parser.add_argument("--n", default="2048,8192")
    parser.add_argument("--k", default="16,32,64")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rows", type=int, default=800_000, help="rows to train on, repeated where the store has fewer")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=64, help="for the spliced loss")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = numbers(parser.parse_args())
    lines = options.results.read_text().split("\n")[:-1] if options.results.exists() else []  # a torn last line is redone
    wanted = {"store": open_store(options.hash, options.stores).digest, "rows": options.rows, "batch_size": options.batch_size}
    results = [r for r in map(json.loads, lines) if wanted.items() <= r.items()]
    if not options.only_table:
        train_all(options, results)
    found = summary(results)
    if options.table:
        about = f"Store {wanted['store'][:12]}, {options.rows:,} rows in batches of {options.batch_size:,}.\n\n"
        options.table.write_text(f"# Recipe quality\n\n{(__doc__ or '').strip()}\n\n{about}{table(found)}")
    if options.picture:
        draw(found, options.picture)
    print(json.dumps({"results": results, "summary": found}) if options.json else table(found))


if __name__ == "__main__":
    main()
