"""`trainer fit`: the command line of a fleet, and the list of what can be in one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import complete, output
from .fleet import fleet_progress, named_values
from .options import DEVICE, JSON, PATH, RUNS, STORES, Commas, Count, Size, option, with_options
from .study import run_study

if TYPE_CHECKING:
    from actstore.reader import Store

# An option without a value here has the default of FitConfig, so that --config can set it.
FIT_OPTIONS = with_options(
    option("--store", "store_prefixes", required=True, multiple=True, metavar="HASH", shell_complete=complete.stores, help="Digest of the store, or a unique prefix of it, or s3://BUCKET/PREFIX#HASH (gs, az, file); repeat it with row-aligned stores for a crosscoder."),
    option("--target-store", "target_prefixes", multiple=True, metavar="HASH", show_default=False, shell_complete=complete.stores, help="Row-aligned store to reconstruct from --store: a transcoder."),
    option("--preset", type=click.Choice(["reference"]), help='reference: train one SAE exactly as the study "SAE at scale" does, from a store of `actstore capture --preset reference`, and print its table beside honest numbers; --n-latents 2048, --k 32, --lr 0.001, --seed 42, --epochs 5 and --batch-size 128 may be changed.  [default: none]'),
    option("--skip", is_flag=True, default=None, help="Give a transcoder a linear map from its input to its output."),
    option("--config", type=PATH, metavar="FILE", help="TOML file with any of the options below (n_latents = [1024, 2048]); options given here win."),
    option("--arch", type=Commas(str, "name"), metavar="NAME,…", shell_complete=complete.files_of("trainer.architectures"), help="Architectures, comma list; `trainer archs` lists them.  [default: topk]"),
    option("--n-latents", "--n-features", type=Commas(int, "integer"), metavar="LATENTS,…", help="Dictionary sizes, comma list.  [default: 2048]"),
    option("--k", type=Commas(int, "integer"), metavar="LATENTS,…", help="Active latents a row, comma list.  [default: 32]"),
    option("--lr", type=Commas(float, "number", auto=True), metavar="RATE,…", help="Adam's learning rates, comma list, or auto: 2e-4 / sqrt(n_latents / 16384), up to 4 times as much where the fit has fewer than 8,000 steps.  [default: auto]"),
    option("--seed", type=Commas(int, "integer"), metavar="N,…", help="Seeds of the initial weights, comma list.  [default: 42]"),
    option("--epochs", type=float, metavar="PASSES", help="Passes over the rows; a fraction is a part of one.  [default: 1]"),
    option("--rows", type=Count(0), metavar="ROWS", help="Rows to train on in all, instead of --epochs.  [default: as --epochs says]"),
    option("--batch-size", type=Count(0), metavar="ROWS", help="Rows of a step.  [default: 4096]"),
    option("--holdout", type=float, metavar="FRACTION", help="Fraction of documents held out for evaluation, from 0 up to 1.  [default: 0.02]"),
    option("--skip-positions", type=Count(0), metavar="POSITIONS", help="Leave out the first positions of each sequence, so many.  [default: 0]"),
    option("--exclude-special", is_flag=True, default=None, help="Leave out rows of special tokens (BOS, EOS, padding)."),
    option("--shuffle", type=click.Choice(["window", "exact", "chunks"]), help="Windows of 512 MiB of 256 KiB blocks, one permutation of all rows in memory, or windows of whole chunks, for spinning disks and buckets.  [default: window; chunks for a store in a bucket]"),
    option("--shuffle-seed", type=int, metavar="N", help="Seed of the order of rows, shared by the fleet.  [default: 0]"),
    option("--option", "options_of_arch", multiple=True, metavar="NAME=VALUE", show_default=False, help="Option of an architecture, such as bandwidth=0.01; `trainer archs` lists them."),
    option("--normalize", type=click.Choice(["median", "mean-norm", "dimension", "none"]), help="Units of the rows in training: median norm 1, mean norm √d_model, each dimension's own deviation, or as stored.  [default: median]"),
    option("--centre", type=click.Choice(["median", "mean", "zero"]), help="What b_dec begins with: geometric median or mean of a sample, or zero.  [default: median]"),
    option("--dead", type=click.Choice(["auxk", "resample", "none"]), help="What brings dead latents back: AuxK (Gao et al.), resampling (Bricken et al.), or nothing.  [default: auxk]"),
    option("--aux-k", type=Count(0), metavar="LATENTS", help="Dead latents that help reconstruct the residual.  [default: d_model / 2]"),
    option("--aux-alpha", type=float, metavar="WEIGHT", help="Weight of that loss; 0 turns it off.  [default: 1/32]"),
    option("--dead-after-rows", type=Count(0), metavar="ROWS", help="A latent is dead after this many rows without activity.  [default: a tenth of the rows, at most 10 million]"),
    option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), help="Precision of the encoder's product; weights and sums are float32. float32 uses bfloat16 where the result is proven equal.  [default: auto, which is float32]"),
    option("--max-memory", type=Size(), metavar="BYTES", help="Memory of the SAEs trained at once, such as 8GB; a larger fleet is trained in several passes.  [default: 90% of what is available]"),
    option("--kernel", type=click.Choice(["auto", "reference", "fast"]), default="auto", help="How a step is computed; the results agree within rounding."),
    option("--parallel", type=click.Choice(["auto", "fleet", "data", "latents"]), default="auto", help="How the processes of torchrun (or RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) share the work: each trains some of the SAEs, takes a share of every batch, or holds a share of the latents. auto: fleet where there are as many SAEs as processes, else data, or latents where an SAE does not fit."),
    option("--timeout", type=click.FloatRange(min=1), metavar="SECONDS", default=600.0, help="After so long without an answer from another process the fit ends, and says which one is missing."),
    option("--log", "logger", type=click.Choice(["tensorboard", "wandb", "trackio"]), help="Show the numbers of metrics.jsonl there too: RUNS/tensorboard, RUNS/wandb (offline), or trackio's own folder.  [default: nowhere]"),
    option("--cache", type=PATH, metavar="FOLDER", help="Folder for chunks of stores in buckets (or $ACTSTORE_CACHE).  [default: ~/.cache/actstore]"),
    option("--cache-size", type=Size(), metavar="BYTES", default="50GB", help="Most that this process keeps there, such as 200GB."),
    DEVICE, STORES, RUNS, JSON,
)  # fmt: skip


def _opener(stores: Path, cache: Path | None, cache_bytes: int, stack: contextlib.ExitStack) -> Callable[[str], Store]:
    """Return what opens a store by its digest, or by URL#HASH through the cache; the stack closes the cache."""
    from actstore.cache import Cache
    from actstore.catalog import open_store
    from actstore.errors import UsageError

    opened = stack.enter_context(Cache(cache, cache_bytes))

    def open_one(address: str) -> Store:
        if "://" not in address:
            return open_store(address, stores)
        if "#" not in address:
            raise UsageError("the URL does not say which store", address, f"write URL#HASH; `actstore ls {address}` lists them")
        return opened.open(address)

    return open_one


@click.command("fit")
@FIT_OPTIONS
@output.command
def fit_command(
    store_prefixes: tuple[str, ...], target_prefixes: tuple[str, ...], preset: str | None, config: Path | None, device: str,
    kernel: str, max_memory: int | None, parallel: Any, timeout: float, stores: Path, runs: Path, as_json: bool,
    options_of_arch: tuple[str, ...], logger: str | None, cache: Path | None, cache_size: int, **options: Any,
) -> None:  # fmt: skip
    """Train a fleet of SAEs from a store: every combination of the comma lists, all from the same batches.

    Prints the run digest of each SAE, one a line. A finished fit costs nothing; an interrupted one goes on when the
    same command is run again.

    \b
    trainer fit --store 3fa9 --n-latents 4096 --k 16,32,64
    trainer fit --store 3fa9 --arch jumprelu --k 32 --option bandwidth=0.01 --rows 50M
    """
    from actstore.catalog import open_store
    from actstore.errors import UsageError
    from trainer.config import FitConfig, load_config, parse_config
    from trainer.distributed import connected
    from trainer.fit import fit
    from trainer.loggers import log_to
    from trainer.memory import chosen_device
    from trainer.sources import aligned

    values = load_config(config) if config else {}
    values |= {name: value for name, value in options.items() if value is not None}
    if values.get("precision") == "auto":
        del values["precision"]
    if options_of_arch:
        values["option"] = {**values.get("option", {}), **named_values(options_of_arch)}
    if any("://" in prefix for prefix in (*store_prefixes, *target_prefixes)):
        values.setdefault("shuffle", "chunks")
    if preset:
        if (
            len(store_prefixes) > 1
            or target_prefixes
            or max_memory
            or logger
            or kernel != "auto"
            or device not in ("auto", "cpu")
        ):
            raise UsageError("--preset reference trains from one store, on the CPU, as the study does", do="leave the rest out")
        run_study(open_store(store_prefixes[0], stores), values, runs, as_json)
        return
    fleet = parse_config(values, FitConfig, "trainer fit")
    with contextlib.ExitStack() as stack:
        opened = _opener(stores, cache, cache_size, stack)
        sources = aligned(*([opened(p) for p in prefixes] for prefixes in (store_prefixes, target_prefixes)))
        ranks = stack.enter_context(connected(timeout, chosen_device(device).type == "cuda"))
        progress = stack.enter_context(fleet_progress(rank=ranks.rank, world=ranks.world))
        if logger is not None and not ranks.rank:
            progress = stack.enter_context(log_to(logger, runs, progress))
        ways = {"device": device, "kernel": kernel, "max_memory": max_memory, "parallel": parallel, "ranks": ranks}
        results = fit(sources, fleet, runs, **ways, progress=progress)
    if ranks.rank:
        return
    if all(r.repeated for r in results):
        output.note("already trained: nothing to do")
    if as_json:
        output.print_json({"runs": [{"digest": r.digest, "metrics": r.metrics, "repeated": r.repeated} for r in results]})
        return
    for result in results:
        click.echo(result.digest)


@click.command("archs")
@JSON
@output.command
def archs_command(as_json: bool) -> None:
    """List the architectures and the options each has, with their defaults."""
    from trainer.architectures import architecture_names, load_architecture, options_of

    found = {name: options_of(name) for name in architecture_names()}
    if as_json:
        output.print_json({"architectures": found})
        return
    for name, options in found.items():
        click.echo(f"{name:12} {(sys.modules[load_architecture(name).__module__].__doc__ or '').splitlines()[0]}")
        for known, default in options.items():
            click.echo(f"{'':12}   {known}={default}")
