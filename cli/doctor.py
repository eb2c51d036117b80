"""`actstore doctor`: is this machine fit for the work, and what to do if not."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import click

from . import output
from .options import JSON, STORES


@click.command("doctor")
@STORES
@JSON
@output.command
def doctor_command(stores: Path, as_json: bool) -> None:
    """Look at versions, devices, disk, locks, the hub and the stores; say what is wrong and what to do.

    Each line is ok, warn (it works, but) or fail. The exit code is 0, or that of the first failure's error. Writes 32 MiB
    into the folder of stores and deletes them; nothing else is changed, and no token is shown.
    """
    from actstore import doctor
    from trainer.doctor import check_devices

    found: list[doctor.Check] = []
    looks = (
        doctor.check_versions(),
        check_devices(),
        doctor.check_folder(stores),
        doctor.check_hub(),
        doctor.check_stores(stores),
    )
    for check in chain(*looks):
        found.append(check)
        if not as_json:
            click.echo(f"{check.state:5} {check.name:20} {check.text}" + (f"\n{'':26} do: {check.do}" if check.do else ""))
    failed = [check.code for check in found if check.state == "fail"]
    if as_json:
        output.print_json({"ok": not failed, "checks": [asdict(check) for check in found]})
    sys.exit(failed[0] if failed else 0)
