"""`actstore push` and `pull`: stores in buckets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import output
from .options import HASH, JSON, STORES

if TYPE_CHECKING:
    from actstore.remote import Transfer

URL = click.argument("url", metavar="URL")


@click.command("push")
@HASH
@URL
@STORES
@JSON
@output.command
def push_command(hash_: str, url: str, stores: Path, as_json: bool) -> None:
    """Copy a sealed store into a bucket: s3://BUCKET/PREFIX, gs://…, az://CONTAINER/PREFIX or file:///FOLDER.

    Only what is missing there moves, and nobody sees the store before it is whole. After an interruption the same
    command goes on. Credentials come from the environment or the profile in $AWS_PROFILE (docs/remote.md).
    """
    from actstore.bucket import open_bucket
    from actstore.catalog import open_store
    from actstore.remote import push

    store = open_store(hash_, stores)
    bucket = open_bucket(url, make=True)
    with output.counting("push", "B", more=True) as progress:
        done = push(store, bucket, progress)
    _say(done, as_json, f"{done.digest[:12]} is whole in {bucket.url}")


@click.command("pull")
@click.argument("hash_", metavar="HASH")
@URL
@STORES
@JSON
@output.command
def pull_command(hash_: str, url: str, stores: Path, as_json: bool) -> None:
    """Copy a sealed store out of a bucket; every byte is verified on arrival. Prints its digest.

    HASH is its digest or a unique prefix of it; `actstore ls URL` lists what is there. Row groups that are here already,
    in a half-done pull or capture or in a store that differs only in its number of rows, do not move. After an
    interruption the same command goes on.
    """
    from actstore.bucket import open_bucket
    from actstore.remote import pull

    bucket = open_bucket(url)
    with output.counting("pull", "B", more=True) as progress:
        done = pull(bucket, hash_, stores, progress)
    _say(done, as_json, f"{done.digest[:12]} is sealed in {stores}")


def _say(done: Transfer, as_json: bool, what: str) -> None:
    if as_json:
        output.print_json(done.as_json())
        return
    linked = f", {done.linked_row_groups} linked" if done.linked_row_groups else ""
    moved = f"{done.moved_row_groups} of {done.row_groups} row groups moved, {output.size(done.moved_bytes)}{linked}"
    output.note(f"{what}: " + ("it was before" if done.repeated else moved))
    click.echo(done.digest)
