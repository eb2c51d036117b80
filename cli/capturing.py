"""`actstore capture`: run a model once, and everything its user sees of it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import complete, output
from .care import run_repair
from .options import JSON, PATH, STORES_OR_URL, Count, command_line, option, with_options

if TYPE_CHECKING:
    from actstore.capture import CaptureRequest, Plan, Progress
    from actstore.corpus import ReadReport
    from actstore.stopping import Stopper
    from actstore.timeline import Timeline

DEFAULT_MODEL, DEFAULT_HOOK, DEFAULT_DATASET = "gpt2-medium", "blocks.12.hook_resid_pre", "NeelNanda/pile-10k"
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "max_documents": 1000, "seq_len": 64, "packing": "reference", "bos": True, "dtype": "float32", "compute_dtype": "float32",
        "center": True,
    }
}  # fmt: skip


def _words(options: dict[str, Any]) -> str:
    """Return options as they are written on a command line."""
    words = [f"--{'' if v else 'no-'}{n}" if isinstance(v, bool) else f"--{n} {v}" for n, v in options.items()]
    return " ".join(words).replace("_", "-")


def _with_preset(options: dict[str, Any], preset: str | None) -> dict[str, Any]:
    """Return the options with a preset's values where none was given on the command line, and say which are used."""
    wanted, source = PRESETS.get(preset or "", {}), click.get_current_context().get_parameter_source
    given = {name: options[name] for name in wanted if source(name) == ParameterSource.COMMANDLINE}
    if preset:
        output.note(f"preset {preset}: {_words({**wanted, **given})}{f'; given here: {_words(given)}' if given else ''}")
    return {**options, **wanted, **given}


# What to capture: the fields of CaptureRequest, but for `stores`.
capture_options = with_options(
    option("--preset", type=click.Choice(list(PRESETS)), show_default=False, help=f"Settings of a published study, where no others are given: reference is {_words(PRESETS['reference'])}, with model, hook point and dataset at their defaults.  [default: none]"),
    option("--model", metavar="FOLDER|ID", default=DEFAULT_MODEL, shell_complete=complete.folder, help="Local model folder (config.json, *.safetensors, tokenizer.json) or hub id."),
    option("--revision", metavar="REVISION", help="Hub branch, tag or commit of the model.  [default: its default branch]"),
    option("--hook", "hooks", metavar="HOOK", multiple=True, default=[DEFAULT_HOOK], shell_complete=complete.hooks, help="TransformerLens hook point; repeat it for several stores from one pass."),
    option("--corpus", multiple=True, type=PATH, metavar="PATH", show_default=False, help="JSONL (.gz, .bz2, .xz), .txt, .csv, .tsv, Parquet or Arrow file, a folder of these, or one that `datasets` saved; repeatable."),
    option("--dataset", metavar="ID|FOLDER", help=f"Hub dataset, streamed; or a local folder, as --corpus.  [default without --corpus: {DEFAULT_DATASET}]"),
    option("--dataset-config", metavar="NAME", help="Configuration of the hub dataset.  [default: its default one]"),
    option("--split", metavar="NAME", default="train", help="Split of the hub dataset."),
    option("--dataset-revision", metavar="REVISION", help="Commit of the hub dataset.  [default: its newest]"),
    option("--text-field", metavar="FIELD", default="text", help="Field that holds the text; dots reach into nested objects."),
    option("--token-field", metavar="FIELD", help="Field that holds token ids instead: nothing is tokenized, and BOS is added only with --bos."),
    option("--chat-template", metavar="default|FILE", help="Render the chats in --text-field (lists of role and content): 'default' is the tokenizer's template, else a Jinja file. A BOS at a chat's beginning is left to --bos."),
    option("--bad-lines", type=click.Choice(["error", "skip"]), default="error", help="What a record that is no document does; part of the key."),
    option("--max-documents", type=Count(), metavar="DOCUMENTS", help="Use the first documents only, so many.  [default: all]"),
    option("--seq-len", type=Count(), metavar="TOKENS", default=128, help="Tokens of a sequence, BOS included."),
    option("--packing", type=click.Choice(["pack", "truncate", "reference"]), default="pack", help="Join documents into full sequences, or keep the first --seq-len tokens of each; reference is the rows of --preset reference, padding among them."),
    option("--pad-together", type=Count(), metavar="DOCUMENTS", help="With --packing reference: documents that are padded to the longest of them; the study trains on the first so many.  [default: 8000 / --seq-len]"),
    option("--bos/--no-bos", default=None, show_default=False, help="Begin each sequence with the BOS token.  [default: if the tokenizer has one]"),
    option("--rows", type=Count(), metavar="ROWS", help="Rows (tokens) to store, such as 1e6.  [default: all]"),
    option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16", "int8"]), default="auto", help="Stored dtype; auto is the compute dtype, int8 is a quarter of float32 at an error of 6e-5 of the variance."),
    option("--compute-dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", help="Dtype the model computes in; auto is the checkpoint's."),
    option("--center/--no-center", default=False, help="Subtract each row's mean, as TransformerLens's processed weights do."),
    option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where the model runs; auto is CUDA, else MPS, else the CPU."),
    option("--batch-tokens", type=Count(), metavar="TOKENS", help="Tokens of one model batch.  [default: 512 a CPU core, 1024 to 4096; 32768 on a GPU]"),
    option("--workers", type=int, metavar="PROCESSES", help="Processes that run this same command and share the work; more than 1 lets others in.  [default: $WORLD_SIZE, else tasks of an srun times elements of a Slurm array, else 1]"),
    option("--rank", type=int, metavar="N", help="Which of them this one is, from 0: where it begins.  [default: $RANK, else $SLURM_PROCID and $SLURM_ARRAY_TASK_ID, else 0]"),
    option("--backend", metavar="NAME", default="auto", shell_complete=complete.files_of("actstore.backends"), help="What runs the model: transformers (fast attention, the usual hook points of common models), transformer_lens (every hook point), auto (the first where it can); toy is for tests (--model toy:16). Part of the key."),
)  # fmt: skip


@click.command("capture")
@with_options(
    capture_options, STORES_OR_URL,
    option("--dry-run", is_flag=True, help="Print the plan (rows, bytes, free disk), read the corpus, and stop before loading weights." ),
    option("--repair", "mend", is_flag=True, help="Check a finished store and compute its damaged row groups again."),
    option("--until", metavar="HH:MM", help="Stop at a row group's end so that all is on disk by this local time: 08:00, or 2026-11-24T08:00.  [default: when all is done]"),
    JSON,
)  # fmt: skip
@output.command
def capture_command(dry_run: bool, mend: bool, until: str | None, as_json: bool, **options: Any) -> None:
    """Run a model once over a corpus and store its activations.

    Prints the store digest of each hook point, one a line, so `trainer fit --store $(actstore capture …)` works.
    A finished store costs nothing; an interrupted one goes on when the same command is run again. SIGTERM and SIGUSR1
    finish the row groups in hand and exit with 143 and 0.

    \b
    actstore capture --model ./gpt2 --hook blocks.6.hook_resid_pre --corpus text.jsonl --rows 1e6
    actstore capture --model ./gpt2 --hook blocks.4.hook_resid_pre --hook blocks.8.hook_resid_pre --corpus texts/ --until 08:00
    """
    from actstore.capture import StoppedError, capture
    from actstore.errors import UsageError
    from actstore.places import place_of
    from actstore.stopping import Stopper, parse_time

    if mend and "://" in str(options["stores"]):
        raise UsageError("--repair works on a folder, not on a bucket", do="`actstore pull` the store and repair it here")
    request = request_of(options)
    stopper = Stopper(parse_time(until, datetime.now()) if until else None, output.note)
    plans: list[Plan] = []
    with output.progress("capture", None, "row") as bar, stopper.listening():
        progress = _progress(bar, plans, request, stopper)
        try:
            digests = capture(request, progress, dry_run)
        except StoppedError:
            linked = request.workers == 1 and isinstance(request.stores, Path)  # workers leave gaps; a bucket has no links
            _stopped(bar.n, plans, stopper, linked, as_json)
        if not plans:
            bar.leave = False
    if not plans:
        output.note("already captured: nothing to do")
    elif not dry_run:
        output.note(_timeline_text(progress.timeline))
    if mend and not dry_run:
        for digest in digests:
            run_repair(request, digest, options["stores"])
    if as_json:
        plan, place = plans[0] if plans else None, place_of(request.stores)
        output.print_json({
            "digests": dict(zip(request.hooks, digests, strict=True)), "dry_run": dry_run, "sealed": not dry_run,
            "rows": plan.rows if plan else place.sealed_rows(digests[0]), "needed_bytes": plan.needed_bytes if plan else 0,
            "free_bytes": plan.free_bytes if plan else place.free_bytes(), "memory_bytes": plan.memory_bytes if plan else 0,
            "timeline": progress.timeline.shares() if plan and not dry_run else {},
        })  # fmt: skip
    elif not dry_run:
        for digest in digests:
            click.echo(digest)


def request_of(options: dict[str, Any]) -> CaptureRequest:
    """Return the request that the options of `capture_options` make."""
    from actstore.mounts import network_filesystem
    from actstore.request import CaptureRequest, worker_of

    options = _with_preset(options, options.pop("preset"))
    if options["dataset"] and Path(options["dataset"]).is_dir():
        folder = Path(options["dataset"])
        split = folder / options["split"]
        named = (folder / "dataset_dict.json").is_file() and split.is_dir()
        options["corpus"], options["dataset"] = (*options["corpus"], split if named else folder), None
    if not options["corpus"] and not options["dataset"]:
        options["dataset"] = DEFAULT_DATASET
    if isinstance(options["stores"], Path) and (network := network_filesystem(options["stores"])):
        output.note(f"{options['stores']} lies on a network file system ({network}): locks and renames are not promised there")
    workers, rank, variable = worker_of(os.environ)
    by = f" (by {variable})" if variable and options["rank"] is None else ""
    for name, there in (("workers", workers), ("rank", rank)):
        options[name] = there if options[name] is None else options[name]
    request = CaptureRequest(**options)
    if request.workers > 1:
        output.note(f"worker {request.rank} of {request.workers}{by}")
    return request


def _progress(bar: Any, plans: list[Plan], request: CaptureRequest, stopper: Stopper) -> Progress:
    """Return callbacks that feed a progress bar, and keep the plan."""
    from actstore.capture import Progress
    from actstore.places import place_of

    place = place_of(request.stores)

    def on_plan(plan: Plan) -> None:
        plans.append(plan)
        bar.total = plan.rows
        output.note(_plan_text(plan))

    def on_corpus(report: ReadReport) -> None:
        left_out = f" ({report.empty} empty left out, {report.bad} bad skipped)" if report.empty + report.bad else ""
        output.note(f"{report.documents} documents read{left_out}")

    def on_commit() -> None:
        free = place.free_bytes()
        left = "" if free is None else f", {output.size(free)} of disk left"
        bar.set_postfix_str(f"last commit {datetime.now():%H:%M:%S}{left}", refresh=False)

    return Progress(on_plan, on_corpus, lambda rows: bar.update(rows) and None, on_commit, output.note, stopper)


def _stopped(rows: int, plans: list[Plan], stopper: Stopper, linked: bool, as_json: bool) -> None:
    """Say how to go on, or to use what is there, and exit: 143 after SIGTERM, else 0."""
    why = stopper.signal.name if stopper.signal else f"--until {stopper.until:%H:%M}"
    how_far = f"{rows} of {plans[0].rows} rows on disk" if plans else "nothing begun"
    output.note(f"stopped ({why}) with {how_far}")
    if rows and linked:
        output.note(f"to use what is there (linked, not computed):\n  {command_line('capture', {'--until': 1}, rows)}")
    output.note(f"to go on:\n  {shlex.join(['actstore', *sys.argv[1:]])}")
    if as_json:
        digests = {store["hook"]: store["digest"] for plan in plans for store in plan.stores}
        wanted = plans[0].rows if plans else None
        output.print_json({"digests": digests, "rows": wanted, "rows_committed": rows, "sealed": False, "stopped": why})
    sys.exit(128 + signal.SIGTERM if stopper.signal == signal.SIGTERM else 0)


def _timeline_text(timeline: Timeline) -> str:
    from actstore.timeline import BESIDE

    shares = timeline.shares()
    main = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name not in BESIDE)
    beside = ", ".join(f"{name} {shares[name]:.1%}" for name in BESIDE if name in shares)
    return f"time: {main}" + (f"; in the writer's threads meanwhile {beside}" if beside else "")


def _plan_text(plan: Plan) -> str:
    free = "" if plan.free_bytes is None else f", {output.size(plan.free_bytes)} free"
    lines = [
        f"{plan.rows} rows; {output.size(plan.needed_bytes)} to write{free}; {output.size(plan.memory_bytes)} of memory or more"
    ]
    for store in plan.stores:
        groups = f"{store['committed']} of {store['row_groups']} row groups there"
        shared = f", {store['linked']} shared with another store" if store["linked"] else ""
        lines.append(f"  {store['digest'][:12]}  {store['hook']}  d_model {store['d_model']}  {store['dtype']}  {groups}{shared}")
    return "\n".join(lines)
