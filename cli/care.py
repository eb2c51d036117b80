"""`actstore verify`, `repair`, `rm` and `gc`: the care of stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import complete, output
from .options import HASH, JSON, PATH, STORES, YES, option, with_options

if TYPE_CHECKING:
    from actstore.repair import RepairReport
    from actstore.request import CaptureRequest


@click.command("verify")
@HASH
@option("--data", is_flag=True, help="Also read every chunk and check its SHA-256 (about 1 s a GB).")
@STORES
@JSON
@output.command
def verify_command(hash_: str, data: bool, stores: Path, as_json: bool) -> None:
    """Check a sealed store and list all damage found. Exits 1 when there is any."""
    from actstore.catalog import find_sealed
    from actstore.check import check_store
    from actstore.errors import StoreDamaged

    path = find_sealed(hash_, stores)
    with output.counting("verify", "row group") as show:
        report = check_store(path, data, show)
    if as_json:
        output.print_json(report.as_json())
    for finding in [] if as_json else report.findings:
        output.line(str(finding))
    if report.findings:
        raise StoreDamaged(
            f"{len(report.findings)} findings in store {report.digest[:12]}",
            str(path),
            f"`actstore repair {report.digest[:12]}` computes damaged row groups again",
        )
    output.note(f"whole: {report.row_groups} row groups" + ("" if data else " (sizes and records; --data reads every byte)"))


@click.command("repair")
@with_options(
    HASH,
    option("--model", metavar="FOLDER", shell_complete=complete.folder, help="Local model folder it was captured from.  [default: the hub model in its key]"),
    option("--corpus", multiple=True, type=PATH, metavar="PATH", show_default=False, help="Corpus files it was captured from, in the same order."),
    option("--chat-template", metavar="FILE", default="default", help="Jinja file it was captured with; default is the tokenizer's template."),
    STORES, JSON,
)  # fmt: skip
@output.command
def repair_command(
    hash_: str, model: str | None, corpus: tuple[Path, ...], chat_template: str, stores: Path, as_json: bool
) -> None:
    """Compute the damaged row groups of a store again. HASH is a digest or a unique prefix of one.

    A row group is accepted only if it has the digest that the manifest names; otherwise it stays as it was. All other
    settings come from the store's key.
    """
    from actstore.catalog import find_sealed
    from actstore.reader import open_unchecked
    from actstore.repair import request_of

    store = open_unchecked(find_sealed(hash_, stores).absolute())
    report = run_repair(request_of(store, model, corpus, stores, chat_template), store.digest, stores)
    if as_json:
        output.print_json(report.as_json())


def run_repair(request: CaptureRequest, digest: str, stores: Path) -> RepairReport:
    """Repair one store with a progress bar, and say what was done. Raises: StoreDamaged: something was refused."""
    from actstore.catalog import find_sealed
    from actstore.errors import StoreDamaged
    from actstore.reader import open_unchecked
    from actstore.repair import repair

    store = open_unchecked(find_sealed(digest, stores).absolute())
    with output.progress("repair", store.rows, "row") as bar:
        report = repair(request, store, stores, lambda rows: bar.update(rows) and None)
        bar.leave = bool(report.damaged)
    if report.refused:
        raise StoreDamaged(
            "; ".join(report.refused), str(store.path), "capture it again into another folder of stores, and compare the two"
        )
    if report.repaired or report.files:
        output.note(f"repaired {digest[:12]}: {len(report.repaired)} row groups, {len(report.files)} small files")
    else:
        output.note(f"{digest[:12]} is whole: nothing to repair")
    return report


@click.command("rm")
@HASH
@YES
@STORES
@JSON
@output.command
def rm_command(hash_: str, yes: bool, stores: Path, as_json: bool) -> None:
    """Remove a store, sealed or not. Refused while a capture or a trainer holds it."""
    from actstore.catalog import find_digest, remove_store

    digest = find_digest(hash_, stores)
    output.confirm(f"remove store {digest[:12]}?", yes or as_json)
    remove_store(digest, stores)
    output.print_json({"removed": digest}) if as_json else output.note(f"removed {digest[:12]}")


@click.command("gc")
@option("--dry-run", is_flag=True, help="Only list what would be deleted.")
@YES
@STORES
@JSON
@output.command
def gc_command(dry_run: bool, yes: bool, stores: Path, as_json: bool) -> None:
    """Delete unsealed leftovers and trash. Sealed stores, and whatever a running process holds, stay.

    An unsealed store is a capture that stopped: running its command again would go on from its row groups.
    """
    from actstore.garbage import collect

    found = collect(stores, dry_run=True)
    free = [one for one in found if not one.held_by]
    if not dry_run and free:
        output.confirm(f"delete {len(free)} leftovers, {output.size(sum(one.bytes for one in free))}?", yes or as_json)
        found = collect(stores)
    if as_json:
        deleted = sum(one.bytes for one in found if not one.held_by)
        output.print_json({"dry_run": dry_run, "bytes": deleted, "leftovers": [one.as_json() for one in found]})
        return
    for one in found:
        said = f"stays: {one.held_by}" if one.held_by else "would be deleted" if dry_run else "deleted"
        groups = f", {one.row_groups} row groups" if one.row_groups else ""
        output.line(f"{one.digest[:12]}  {one.kind}{groups}, {output.size(one.bytes)}: {said}")
    if not found:
        output.note(f"nothing to delete in {stores}")
