"""`actstore`: capture, and the care of stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import output
from .capturing import capture_command
from .care import gc_command, repair_command, rm_command, verify_command
from .complete import completion_command
from .doctor import doctor_command
from .moving import pull_command, push_command
from .options import HASH, JSON, STORES, Commands, option
from .planning import plan_command

if TYPE_CHECKING:
    from actstore.catalog import Listed


@click.group("actstore", cls=Commands)
@click.version_option(package_name="actstore")
def main() -> None:
    """Capture a language model's activations once; keep them safely on disk; train any number of SAEs from them.

    First: `actstore capture --model FOLDER --hook blocks.6.hook_resid_pre --corpus FILE.jsonl`, then `trainer fit --store HASH`.
    """  # fmt: skip


@main.command("ls")
@click.argument("url", metavar="[URL]", required=False)
@STORES
@JSON
@output.command
def ls_command(url: str | None, stores: Path, as_json: bool) -> None:
    """List the stores of the folder, or those in a bucket (s3://BUCKET/PREFIX, gs, az, file), sealed and unsealed."""
    from actstore.arrivals import list_remote
    from actstore.bucket import open_bucket
    from actstore.catalog import list_stores

    listed = list_stores(stores) if url is None else list_remote(open_bucket(url))
    if as_json:
        output.print_json({"stores": [_listed(line) for line in listed]})
    elif listed:
        rows = [{name: "" if v is None else str(v) for name, v in _listed(line).items()} for line in listed]
        for row, line in zip(rows, listed, strict=True):
            row["state"] = line.problem or ("sealed" if line.sealed else f"unsealed: {line.how_far}")
            row["store"], row["hook point"] = line.digest[:12], row["hook"]
            row["model"] = str(line.manifest.provenance.get("model", "")) if line.manifest else ""
        columns = ["store", "state", "rows", "d_model", "dtype", "hook point", "model"]
        output.print_table(columns, [[row[name] for name in columns] for row in rows])
    else:
        output.note(f"no stores in {url or stores}: " + ("`actstore push` brings one" if url else "`actstore capture` makes one"))


def _listed(line: Listed) -> dict[str, Any]:
    manifest, key = line.manifest, line.key
    return {
        "digest": line.digest, "sealed": line.sealed, "problem": line.problem or None,
        "rows": manifest.rows if manifest else None, "d_model": manifest.d_model if manifest else None,
        "dtype": key.dtype if key else None, "hook": key.hook if key else None,
        "committed_row_groups": line.committed if not line.sealed else len(manifest.groups) if manifest else None,
    }  # fmt: skip


@main.command("info")
@HASH
@STORES
@JSON
@output.command
def info_command(hash_: str, stores: Path, as_json: bool) -> None:
    """Show what a store is derived from, its size and statistics. HASH is a digest or a unique prefix of one."""
    from actstore.catalog import find_digest, list_stores, open_store
    from actstore.describe import describe_store

    digest = find_digest(hash_, stores)
    unsealed = [line for line in list_stores(stores) if line.digest == digest and not line.sealed]
    if unsealed:
        info: dict[str, Any] = {"digest": digest, "sealed": False, "committed_row_groups": unsealed[0].committed}
        info["key"] = unsealed[0].key.model_dump() if unsealed[0].key else None
    else:
        store = open_store(digest, stores)
        info = {
            "digest": digest, "content_digest": store.content_digest, "sealed": True, "rows": store.rows, "d_model": store.d_model,
            "dtype": store.dtype, "hook": store.key.hook, **describe_store(store), "row_groups": len(store.manifest.groups),
            "rows_per_group": store.manifest.group_rows, "key": store.key.model_dump(),
            "provenance": store.manifest.provenance, "path": str(store.path),
        }  # fmt: skip
    if as_json:
        output.print_json(info)
        return
    nested = {title: info.pop(title, None) or {} for title in ("statistics", "key", "provenance")}
    for name, value in {**info, **nested.pop("statistics")}.items():
        shown = "not recorded" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        output.line(f"{name:20} {output.size(value) if name.startswith('bytes') else shown}")
    for title, values in nested.items():
        for name, value in values.items():
            output.line(f"{title}.{name:{19 - len(title)}} {value}")


@main.command("head")
@HASH
@option("-n", "rows", type=click.IntRange(1, 10_000), metavar="ROWS", default=20, help="Rows to show.")
@option("--partial", is_flag=True, help="Look into a capture that is not finished.")
@STORES
@JSON
@output.command
def head_command(hash_: str, rows: int, partial: bool, stores: Path, as_json: bool) -> None:
    """Show the first rows of a store: document, position, token, norm and first coordinates."""
    from actstore.backends import Vocabulary
    from actstore.catalog import open_partial, open_store

    store = open_partial(hash_, stores) if partial else open_store(hash_, stores)
    rows = min(rows, store.rows)
    acts = store[:rows].astype("float64")
    tokens, documents, positions = (store.read(a, 0, rows).tolist() for a in ("tokens", "documents", "positions"))
    vocabulary = Vocabulary(tokens=[], special=[]) if partial else store.vocabulary  # it is written at the seal
    texts = [vocabulary.text(t) for t in tokens]
    lines = zip(range(rows), documents, positions, tokens, texts, ((acts**2).sum(1) ** 0.5).tolist(), acts.tolist(), strict=True)
    names = ("row", "document", "position", "token", "text", "norm", "acts")
    if as_json:
        output.print_json({"digest": store.digest, "rows": [dict(zip(names, line, strict=True)) for line in lines]})
        return
    cells = [
        [*map(str, ids), repr(text), f"{norm:.4g}", " ".join(f"{v:+.3f}" for v in row[:6])] for *ids, text, norm, row in lines
    ]
    output.print_table([*names[:-1], "first coordinates"], cells)


for command in (
    plan_command, capture_command, verify_command, repair_command, rm_command, gc_command, push_command, pull_command,
    doctor_command, completion_command,
):  # fmt: skip
    main.add_command(command)
