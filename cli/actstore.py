"""`actstore`: capture, and the care of stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from actstore import catalog, durable
from actstore.backends import Vocabulary
from actstore.capture import CaptureRequest, Plan, Progress, capture
from actstore.describe import describe_store
from actstore.mounts import network_filesystem
from actstore.reader import Store

from . import output
from .care import gc_command, repair_command, rm_command, run_repair, verify_command
from .options import JSON, STORES

DEFAULT_MODEL, DEFAULT_HOOK, DEFAULT_DATASET = "gpt2-medium", "blocks.12.hook_resid_pre", "NeelNanda/pile-10k"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="actstore")
def main() -> None:
    """Capture a language model's activations once; keep them safely on disk; train any number of SAEs from them.

    Exit codes: 0 done, 1 store damaged, 2 usage, 3 corpus, key or activations, 4 locked, 5 not found or not sealed,
    6 disk full or storage failed, 7 format, 8 training diverged, 130 Ctrl-C, 143 SIGTERM.
    """


def _capture_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Local model folder (config.json, *.safetensors, tokenizer.json) or hub id."),
        click.option("--revision", help="Hub branch, tag or commit of the model.  [default: its default branch]"),
        click.option("--hook", "hooks", multiple=True, default=[DEFAULT_HOOK], show_default=True, help="TransformerLens hook point; repeat it for several stores from one pass."),
        click.option("--corpus", multiple=True, type=click.Path(path_type=Path), help="JSONL, JSONL.gz, .txt or Parquet file, or a folder of these; repeatable."),
        click.option("--dataset", help=f"Hub dataset, streamed.  [default without --corpus: {DEFAULT_DATASET}]"),
        click.option("--dataset-config", help="Configuration of the hub dataset."),
        click.option("--split", default="train", show_default=True, help="Split of the hub dataset."),
        click.option("--dataset-revision", help="Commit of the hub dataset.  [default: its newest]"),
        click.option("--text-field", default="text", show_default=True, help="Field that holds the text; dots reach into nested objects."),
        click.option("--bad-lines", type=click.Choice(["error", "skip"]), default="error", show_default=True, help="What a record that is no document does; part of the key."),
        click.option("--max-documents", type=click.IntRange(1), help="Use the first N documents.  [default: all]"),
        click.option("--seq-len", type=int, default=128, show_default=True, help="Tokens of a sequence, BOS included."),
        click.option("--packing", type=click.Choice(["pack", "truncate"]), default="pack", show_default=True, help="Join documents into full sequences, or keep the first --seq-len tokens of each."),
        click.option("--bos/--no-bos", default=None, help="Begin each sequence with the BOS token.  [default: if the tokenizer has one]"),
        click.option("--rows", type=click.IntRange(1), help="Rows (tokens) to store.  [default: all]"),
        click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16", "int8"]), default="auto", show_default=True, help="Stored dtype; auto is the compute dtype, int8 is a quarter of float32 at an error of 6e-5 of the variance."),
        click.option("--compute-dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", show_default=True, help="Dtype the model computes in; auto is the checkpoint's."),
        click.option("--center", is_flag=True, help="Subtract each row's mean, as TransformerLens's processed weights do."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True, help="Where the model runs."),
        click.option("--batch-tokens", type=click.IntRange(1), help="Tokens of one model batch.  [default: 4096 on a CPU, 32768 on a GPU]"),
        click.option("--workers", type=int, envvar="WORLD_SIZE", default=1, show_default=True, help="Processes that run this same command and share the work (or $WORLD_SIZE); more than 1 lets others in."),
        click.option("--rank", type=int, envvar="RANK", default=0, show_default=True, help="Which of them this one is, from 0 (or $RANK): where it begins."),
        click.option("--backend", default="transformer_lens", show_default=True, help="What runs the model; 'toy' is for tests (--model toy:16)."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@main.command("capture")
@_capture_options
@STORES
@click.option("--dry-run", is_flag=True, help="Print the plan (rows, bytes, free disk) and stop before loading weights.")
@click.option("--repair", "mend", is_flag=True, help="Check a finished store and compute its damaged row groups again.")
@JSON
@output.command
def capture_command(dry_run: bool, mend: bool, as_json: bool, **options: Any) -> None:
    """Run a model once over a corpus and store its activations.

    Prints the store digest of each hook point, one a line, so `trainer fit --store $(actstore capture …)` works.
    A finished store costs nothing; an interrupted one goes on when the same command is run again.
    """
    if not options["corpus"] and not options["dataset"]:
        options["dataset"] = DEFAULT_DATASET
    request = CaptureRequest(**options)
    plans: list[Plan] = []
    if network := network_filesystem(options["stores"]):
        output.note(f"{options['stores']} lies on a network file system ({network}): locks and renames are not promised there")
    with output.progress("capture", None, "row") as bar:

        def on_plan(plan: Plan) -> None:
            plans.append(plan)
            bar.total = plan.rows
            bar.clear()
            output.note(_plan_text(plan))
            bar.refresh()

        digests = capture(request, Progress(on_plan, lambda rows: bar.update(rows) and None, output.note), dry_run)
        if not plans:
            bar.leave = False
    if not plans:
        output.note("already captured: nothing to do")
    if mend and not dry_run:
        for digest in digests:
            run_repair(request, digest, options["stores"])
    if as_json:
        plan = plans[0] if plans else None
        output.print_json(
            {
                "digests": dict(zip(request.hooks, digests, strict=True)),
                "rows": plan.rows if plan else catalog.open_store(digests[0], options["stores"]).rows,
                "needed_bytes": plan.needed_bytes if plan else 0,
                "free_bytes": plan.free_bytes if plan else durable.free_bytes(options["stores"]),
                "memory_bytes": plan.memory_bytes if plan else 0,
                "dry_run": dry_run,
            }
        )
    elif not dry_run:
        for digest in digests:
            click.echo(digest)


def _plan_text(plan: Plan) -> str:
    lines = [
        f"{plan.rows} rows in {plan.sequences} sequences of {plan.documents} documents"
        + (f" ({plan.empty} empty left out, {plan.bad} bad skipped)" if plan.empty + plan.bad else "")
        + f"; {output.size(plan.needed_bytes)} to write, {output.size(plan.free_bytes)} free; {output.size(plan.memory_bytes)} of memory or more"
    ]
    for store in plan.stores:
        groups = f"{store['committed']} of {store['row_groups']} row groups there"
        shared = f", {store['linked']} shared with another store" if store["linked"] else ""
        lines.append(f"  {store['digest'][:12]}  {store['hook']}  d_model {store['d_model']}  {store['dtype']}  {groups}{shared}")
    return "\n".join(lines)


@main.command("ls")
@STORES
@JSON
@output.command
def ls_command(stores: Path, as_json: bool) -> None:
    """List the stores, sealed and unsealed."""
    listed = catalog.list_stores(stores)
    if as_json:
        output.print_json({"stores": [_listed_json(line) for line in listed]})
        return
    rows = []
    for line in listed:
        state = "sealed" if line.sealed else f"unsealed: {line.how_far}"
        manifest, key = line.manifest, line.key
        rows.append(
            [
                line.digest[:12],
                line.problem or state,
                str(manifest.rows) if manifest else "",
                str(manifest.d_model) if manifest else "",
                key.dtype if key else "",
                key.hook if key else "",
                str(manifest.provenance.get("model", "")) if manifest else "",
            ]
        )
    if rows:
        output.print_table(["store", "state", "rows", "d_model", "dtype", "hook point", "model"], rows)
    else:
        output.note(f"no stores in {stores}: `actstore capture` makes one")


def _listed_json(line: catalog.Listed) -> dict[str, Any]:
    return {
        "digest": line.digest,
        "sealed": line.sealed,
        "rows": line.manifest.rows if line.manifest else None,
        "d_model": line.manifest.d_model if line.manifest else None,
        "dtype": line.key.dtype if line.key else None,
        "hook": line.key.hook if line.key else None,
        "committed_row_groups": line.committed if not line.sealed else len(line.manifest.groups) if line.manifest else None,
        "problem": line.problem or None,
    }


@main.command("info")
@click.argument("hash_")
@STORES
@JSON
@output.command
def info_command(hash_: str, stores: Path, as_json: bool) -> None:
    """Show what a store is derived from, its size and statistics. HASH_ is a digest or a unique prefix of one."""
    digest = catalog.find_digest(hash_, stores)
    unsealed = [line for line in catalog.list_stores(stores) if line.digest == digest and not line.sealed]
    if unsealed:
        info: dict[str, Any] = {"digest": digest, "sealed": False, "committed_row_groups": unsealed[0].committed}
        info["key"] = unsealed[0].key.model_dump() if unsealed[0].key else None
    else:
        info = _info_json(catalog.open_store(digest, stores))
    if as_json:
        output.print_json(info)
        return
    key = info.pop("key") or {}
    statistics = info.pop("statistics", {})
    provenance = info.pop("provenance", {})
    for name, value in {**info, **statistics}.items():
        shown = "not recorded" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        shown = output.size(value) if name.startswith("bytes") else shown
        click.echo(f"{name:20} {shown}")
    for title, values in (("key", key), ("provenance", provenance)):
        for name, value in values.items():
            click.echo(f"{title}.{name:{19 - len(title)}} {value}")


def _info_json(store: Store) -> dict[str, Any]:
    described = describe_store(store)
    return {
        "digest": store.digest,
        "content_digest": store.content_digest,
        "sealed": True,
        "rows": store.rows,
        "d_model": store.d_model,
        "dtype": store.dtype,
        "hook": store.key.hook,
        **{name: value for name, value in described.items() if name != "statistics"},
        "row_groups": len(store.manifest.groups),
        "rows_per_group": store.manifest.group_rows,
        "key": store.key.model_dump(),
        "statistics": described["statistics"],
        "provenance": store.manifest.provenance,
        "path": str(store.path),
    }


@main.command("head")
@click.argument("hash_")
@click.option("-n", "rows", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Rows to show.")
@click.option("--partial", is_flag=True, help="Look into a capture that is not finished.")
@STORES
@JSON
@output.command
def head_command(hash_: str, rows: int, partial: bool, stores: Path, as_json: bool) -> None:
    """Show the first rows of a store: document, position, token, norm and first coordinates."""
    store = catalog.open_partial(hash_, stores) if partial else catalog.open_store(hash_, stores)
    rows = min(rows, store.rows)
    acts = store[:rows].astype("float64")
    tokens, documents, positions = (store.read(a, 0, rows).tolist() for a in ("tokens", "documents", "positions"))
    vocabulary = Vocabulary([], []) if partial else store.vocabulary  # it is written at the seal
    texts = [vocabulary.text(t) for t in tokens]
    norms = ((acts**2).sum(1) ** 0.5).tolist()
    if as_json:
        names = ("row", "document", "position", "token", "text", "norm", "acts")
        lines = zip(range(rows), documents, positions, tokens, texts, norms, acts.tolist(), strict=True)
        output.print_json({"digest": store.digest, "rows": [dict(zip(names, line, strict=True)) for line in lines]})
        return
    output.print_table(
        ["row", "document", "position", "token", "text", "norm", "first coordinates"],
        [
            [str(i), str(documents[i]), str(positions[i]), str(tokens[i]), repr(texts[i]), f"{norms[i]:.4g}", " ".join(f"{v:+.3f}" for v in acts[i, :6])]
            for i in range(rows)
        ],
    )  # fmt: skip


for care_command in (verify_command, repair_command, rm_command, gc_command):
    main.add_command(care_command)


@main.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output.command
def completion_command(shell: str) -> None:
    """Print the shell completion script; eval it in the shell's start-up file."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "actstore", "_ACTSTORE_COMPLETE").source())
