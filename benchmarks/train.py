"""How close a training step comes to its one dense product, and how that grows; every ratio within one run.

    python benchmarks/train.py --quick --json                 # the three sizes of docs/training.md; under 3 minutes
    python benchmarks/train.py --grow --table OUT.md --picture OUT.png   # pip install -e .[bench]
    python benchmarks/train.py --quick --peer sparsify=/venv/bin/python --peer saelens=/venv2/bin/python

A step is `trainer.member.train_step`: loss, gradients, projection, clipping, Adam, unit norms, dead latents, the log line.
Each size runs in a process of its own, so that its peak memory is its own; times are medians.

    tokens_per_s    rows of a batch / time of a step
    ratio_dense     the same step with dense products and autograd (the reference kernel) / ours
    ratio_encoder   ours / the encoder's product alone, as this kernel computes it (1 is the floor)
    ratio_gemm      ours / one float32 product of that size at the rate measured beside it
    ratio_dead      a step with half of the latents dead / ours
    fleet           S SAEs trained on one batch / S times one of them
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.checkpoint import Run
from trainer.config import FitConfig, resolve
from trainer.fit import squared_distance
from trainer.kernels import cpu
from trainer.member import Member, Scaling, open_member, train_step
from trainer.normalize import Normalization
from trainer.sae import Batch

PEERS = Path(__file__).parent / "peers"
SIZES = [(1024, 2048, 32, 128), (1024, 2048, 32, 4096), (1024, 16384, 32, 4096)]  # d, n, k, batch
GROWTH = {
    "n": [(1024, n, 32, 2048) for n in (2048, 4096, 8192, 16384, 32768, 65536)],
    "k": [(1024, 16384, k, 2048) for k in (8, 32, 128, 512)],
    "d": [(d, 8192, 32, 2048) for d in (576, 1024, 2048, 4096)],
}
FLEETS = (1, 2, 4, 8, 16)


def rows_like_activations(batch: int, d: int) -> torch.Tensor:
    """Return (batch, d) float32 rows: 24 of 4,096 directions each, used by Zipf's law, a mean, noise."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4096, d, generator=generator))
    share = 1 / torch.arange(1, 4097.0)
    rows = torch.empty(batch, d)
    for part in rows.split(128):  # so that making them is not the peak of memory
        used = torch.multinomial(share.expand(len(part), -1), 24, generator=generator)
        part.copy_((torch.rand(len(part), 24, 1, generator=generator) * directions[used]).sum(1) / 3 + 0.1 * directions[0])
    return rows + 0.02 * torch.randn(batch, d, generator=generator)


def median_s(work: Callable[[], Any], times: int, warm: int = 1) -> float:
    """Return the median wall time of `work`, in seconds."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def unscaled(sample: torch.Tensor) -> Scaling:
    """Return the scaling that leaves rows as they are, with the centre at zero."""
    one, zero = torch.ones_like(sample[0]), torch.zeros_like(sample[0])
    return Scaling((Normalization(one, zero),), 1, Batch(sample, sample), zero, None, 1.0)


def member_of(d: int, n: int, k: int, batch: int, folder: Path, kernel: str) -> Member:
    """Return an SAE ready to train, with a run folder of its own that only gets its log lines."""
    (config,) = resolve(FitConfig(n_latents=(n,), k=(k,), batch_size=batch, rows=batch * 100_000), d, batch * 100_000)
    folder = folder / kernel
    folder.mkdir(exist_ok=True)
    run = Run(folder, config, "0" * 64, "0" * 64, d, {}, "", (), None)
    return open_member(run, unscaled(torch.zeros(2, d)), torch.device("cpu"), kernel)


def phases(member: Member, x: torch.Tensor, times: int) -> dict[str, float]:
    """Return the milliseconds of a step's parts, taken one by one."""
    sae, k = member.sae, member.run.config.k
    spent: dict[str, list[float]] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return result

    from trainer.kernels.gradients import recycle
    from trainer.member import clip_gradients_

    for _ in range(times + 1):
        code = part("encode", lambda: cpu.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, k))
        error = part("decode, error, code gradient", lambda c=code: cpu.squared_error(x, c, sae.W_dec, sae.b_dec)[0])
        part("weight gradients", lambda e=error: (e / len(x)).backward())
        part("project, clip", lambda: clip_gradients_(sae, cpu))
        part("Adam", member.optimizer.step)
        part("unit norms", lambda: cpu.normalize_rows_(sae.W_dec))
        recycle(sae.parameters())
    return {name: round(statistics.median(values[1:]), 2) for name, values in spent.items()}


def gemm_s(d: int, n: int, batch: int, dtype: torch.dtype) -> float:
    """Return the seconds of one (batch, d) x (d, n) product, output memory reused, in chunks of 1,024 rows."""
    x, W = torch.randn(batch, d).to(dtype), torch.randn(n, d).to(dtype)
    out = torch.empty(min(batch, 1024), n, dtype=dtype)
    return median_s(lambda: [torch.mm(p, W.T, out=out[: len(p)]) for p in x.split(1024)], 3)


def measure(d: int, n: int, k: int, batch: int, dense: bool, seconds: float) -> dict[str, Any]:
    """Return one size's numbers; about `seconds` go to each of its timings."""
    x = rows_like_activations(batch, d)
    norm = squared_distance(x, torch.zeros(d))
    rows = Batch(x, x)
    with tempfile.TemporaryDirectory() as scratch:
        member = member_of(d, n, k, batch, Path(scratch), "fast")
        once = median_s(lambda: train_step(member, rows, norm), 1)
        times = max(3, min(50, round(seconds / once)))
        ours = median_s(lambda: train_step(member, rows, norm), times)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        product = median_s(lambda: encoder_product(member, x), times)
        row = {
            "d": d, "n": n, "k": k, "batch": batch, "tokens_per_s": round(batch / ours), "step_ms": round(1e3 * ours, 2),
            "ratio_encoder": round(ours / product, 3), "ratio_gemm": round(ours / gemm_s(d, n, batch, torch.float32), 3),
            "peak_rss_mb": round(peak_mb), "weights_mb": round(8 * n * d / 2**20), "bfloat16": cpu.has_bfloat16(),
        }  # fmt: skip
        if dense:
            plain = member_of(d, n, k, batch, Path(scratch), "reference")
            slow = median_s(lambda: train_step(plain, rows, norm), 1 if once > 0.5 else 3)
            row["ratio_dense"] = round(slow / ours, 2)
            row["ratio_bf16_gemm"] = round(ours / gemm_s(d, n, batch, torch.bfloat16), 3) if cpu.has_bfloat16() else None
        row["phases_ms"] = phases(member, x, max(2, times // 3))
        after = member.run.config.dead_after_rows
        member.dead.since[::2] = 1 << 60  # half of the latents dead: their counts are set again in each step
        row["ratio_dead"] = round(median_s(lambda: half_dead_step(member, rows, norm, after), max(2, times // 2)) / ours, 3)
    return row


def half_dead_step(member: Member, rows: Batch, norm: float, after: int) -> None:
    """Train one step with every second latent counted as dead."""
    member.dead.since[1::2] = 0
    member.dead.since[::2] = after + 1
    train_step(member, rows, norm)


def encoder_product(member: Member, x: torch.Tensor) -> None:
    """Run the encoder's product alone, as the kernel does: in bfloat16 where the CPU has instructions for it."""
    W, b = member.sae.W_enc.detach(), member.sae.b_enc.detach()
    if not cpu.has_bfloat16():
        for _ in cpu._chunks(x, W, b):
            pass
        return
    low_x, low_W, low_b = x.bfloat16(), W.bfloat16(), b.bfloat16()
    for part in low_x.split(min(len(x), max(64, 2 * cpu.SCORES // len(W)))):
        F.linear(part, low_W, low_b)


def fleet(size: int) -> dict[str, Any]:
    """Return the time of `size` SAEs on one batch over `size` times that of one of them."""
    d, n, batch = 1024, 2048, 2048
    x = rows_like_activations(batch, d)
    norm = squared_distance(x, torch.zeros(d))
    rows = Batch(x, x)
    with tempfile.TemporaryDirectory() as scratch:
        members = []
        for i in range(size):
            (Path(scratch) / str(i)).mkdir()
            members.append(member_of(d, n, (8, 16, 32, 64)[i % 4], batch, Path(scratch) / str(i), "fast"))
        alone = sum(median_s(lambda m=m: train_step(m, rows, norm), 3) for m in members)
        together = median_s(lambda: [train_step(m, rows, norm) for m in members], 3)
    return {"S": size, "ratio_alone": round(together / alone, 3), "ms": round(1e3 * together, 1)}


def in_child(*arguments: object) -> dict[str, Any]:
    """Run this file in a process of its own and return what it prints."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peer_rate(name: str, python: str, rows: Path, n: int, k: int, batch: int) -> float:
    """Return a peer's tokens/s, in its own environment, on the same rows."""
    command = [python, str(PEERS / f"run_{name}.py"), str(rows), str(n), str(k), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"])


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw step time against n, k and d, each with its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GROWTH), figsize=(4.2 * len(GROWTH), 3.6), layout="constrained")
    for axis, name in zip(axes, GROWTH, strict=True):
        lines = found[name]
        axis.loglog([r[name] for r in lines], [r["step_ms"] for r in lines], "o-", label="step")
        axis.loglog([r[name] for r in lines], [r["step_ms"] / r["ratio_encoder"] for r in lines], "k:", label="encoder product")
        fixed = {key: lines[0][key] for key in ("d", "n", "k", "batch") if key != name}
        axis.set(xlabel=name, ylabel="ms", title=", ".join(f"{key} {value}" for key, value in fixed.items()))
        axis.set_xticks([r[name] for r in lines], [str(r[name]) for r in lines], rotation=45)
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.legend()
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    names = [n for n in rows[0] if n not in ("phases_ms", "bfloat16")]
    lines = [names, ["---"] * len(names), *([str(r.get(n, "")) for n in names] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three sizes only")
    parser.add_argument("--grow", action="store_true", help="also growth with n, k, d and the size of a fleet")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each timing  [default: 4]")
    parser.add_argument("--rounds", type=int, default=1, help="of all sizes; medians are given  [default: 1]")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="sparsify, dictionary_learning, saelens"
    )
    parser.add_argument("--table", type=Path, help="write the table here")
    parser.add_argument("--picture", type=Path, help="write the picture of --grow here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *arguments = json.loads(options.child)
        print(json.dumps({"size": measure, "fleet": fleet}[kind](*arguments)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            of_round = [in_child("size", *size, True, options.seconds) for _ in range(options.rounds)]
            row = dict(sorted(of_round, key=lambda r: r["tokens_per_s"])[len(of_round) // 2])
            file = Path(scratch) / "rows.npy"
            np.save(file, rows_like_activations(2 * size[3], size[0]).numpy())
            for name, python in (peer.split("=", 1) for peer in options.peer):
                rate = peer_rate(name, python, file, *size[1:])
                row[name] = round(rate)
                row[f"ratio_{name}"] = round(row["tokens_per_s"] / rate, 2)
            rows.append(row)
            print(f"n {size[1]}, batch {size[3]}: {row['tokens_per_s']} tokens/s", file=sys.stderr)
    grown = (
        {name: [in_child("size", *size, False, 2.0) for size in sizes] for name, sizes in GROWTH.items()} if options.grow else {}
    )
    fleets = [in_child("fleet", size) for size in FLEETS] if options.grow else []
    result = {"rows": rows, "growth": grown, "fleets": fleets, "threads": torch.get_num_threads(), "torch": torch.__version__}
    text = "\n\n".join([table(rows), *(table(lines) for lines in grown.values()), *([table(fleets)] if fleets else [])])
    if options.table:
        options.table.write_text(text + "\n")
    if options.picture and grown:
        draw(grown, options.picture)
    print(json.dumps(result) if options.json else text)


if __name__ == "__main__":
    main()
