"""`actstore`: capture, and the care of stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from actstore import catalog
from actstore.backends import Vocabulary
from actstore.describe import describe_store
from actstore.reader import Store

from . import output
from .capturing import capture_command
from .care import gc_command, repair_command, rm_command, verify_command
from .moving import pull_command, push_command
from .options import JSON, STORES
from .planning import plan_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="actstore")
def main() -> None:
    """Capture a language model's activations once; keep them safely on disk; train any number of SAEs from them.

    Exit codes: 0 done, 1 store damaged, 2 usage, 3 corpus, key or activations, 4 locked, 5 not found or not sealed,
    6 disk full or storage failed, 7 format, 8 training diverged, 130 Ctrl-C, 143 SIGTERM.
    """


@main.command("ls")
@click.argument("url", metavar="[URL]", required=False)
@STORES
@JSON
@output.command
def ls_command(url: str | None, stores: Path, as_json: bool) -> None:
    """List the stores of the folder, or those in a bucket (s3://BUCKET/PREFIX, gs, az, file), sealed and unsealed."""
    if url is not None:
        from actstore.arrivals import list_remote
        from actstore.bucket import open_bucket

        listed = list_remote(open_bucket(url))
    else:
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
        output.note(f"no stores in {url or stores}: " + ("`actstore push` brings one" if url else "`actstore capture` makes one"))


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
        output.line(f"{name:20} {shown}")
    for title, values in (("key", key), ("provenance", provenance)):
        for name, value in values.items():
            output.line(f"{title}.{name:{19 - len(title)}} {value}")


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
    vocabulary = Vocabulary(tokens=[], special=[]) if partial else store.vocabulary  # it is written at the seal
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


for command in (
    plan_command,
    capture_command,
    verify_command,
    repair_command,
    rm_command,
    gc_command,
    push_command,
    pull_command,
):
    main.add_command(command)


@main.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output.command
def completion_command(shell: str) -> None:
    """Print the shell completion script; eval it in the shell's start-up file."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "actstore", "_ACTSTORE_COMPLETE").source())
