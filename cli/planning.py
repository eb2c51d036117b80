"""`actstore plan`: what a capture will take, before it is begun."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from . import output
from .capturing import capture_options, request_of
from .options import JSON, STORES_OR_URL, command_line, option, with_options

if TYPE_CHECKING:
    from actstore.forecast import Forecast

ONLY_HERE = {"--calibrate": 0, "--json": 0, "--budget": 1, "--until": 1}  # options, and how many words follow


@click.command("plan")
@with_options(
    capture_options, STORES_OR_URL,
    option("--calibrate", is_flag=True, help="Load the model and run a few real batches, to know rows a second and memory."),
    option("--budget", metavar="TIME|BYTES", help="Find the rows that fit: 8h, 90m or 2d of wall time (calibrates), or 500GB of disk; in whole row groups."),
    option("--until", metavar="HH:MM", default="08:00", help="Say how many rows there will be by this local time."),
    JSON,
)  # fmt: skip
@output.command
def plan_command(calibrate: bool, budget: str | None, until: str, as_json: bool, **options: Any) -> None:
    """Say what a capture will take: rows, bytes, memory, and with --calibrate hours. Takes the options of `capture`.

    Loads no weights unless it calibrates. Without --rows and --budget it reads the corpus, to count its rows.
    Exit code 6 when the disk is too small, 2 when the memory is.
    """
    from actstore.forecast import forecast, parse_budget
    from actstore.plan import refuse
    from actstore.stopping import parse_time

    request = request_of(options)
    limit = parse_budget(budget) if budget else None
    if calibrate:
        output.note("the model is loaded, and runs for some seconds")
    with output.progress("reading the corpus", None, "row") as bar:
        found = forecast(request, parse_time(until, datetime.now()), limit, calibrate, lambda rows: bar.update(rows) and None)
        bar.leave = False
    if as_json:
        output.print_json({**found.as_json(), "command": command_line("capture", ONLY_HERE, found.request.rows)})
    else:
        _print(found)
    refuse(found.plan, str(request.stores))


def _print(found: Forecast) -> None:
    plan, calibration = found.plan, found.calibration
    counted = "" if found.request.rows is None else " (as asked for; whether the corpus has them is seen when it is read)"
    lines = [("rows", f"{plan.rows:,}{counted}")]
    for store in plan.stores:
        there = f"{store['committed'] + store['linked']} of {store['row_groups']} row groups there or shared"
        lines.append((store["hook"], f"{store['digest'][:12]}, d_model {store['d_model']}, {store['dtype']}, {there}"))
    if not plan.stores:
        lines.append(("stores", "all captured already"))
    lines += [
        (
            "to write",
            output.size(plan.needed_bytes) + ("" if plan.free_bytes is None else f", of {output.size(plan.free_bytes)} free"),
        ),
        ("in each dtype", ", ".join(f"{dtype} {output.size(n)}" for dtype, n in found.bytes_by_dtype.items())),
        ("memory", f"{output.size(plan.memory_bytes)} or more (weights, row groups on their way, token ids)"),
    ]
    if plan.device_bytes:
        lines.append(("GPU memory", f"{output.size(plan.device_bytes)} or more (weights)"))
    if calibration is not None:
        lines += [
            ("model", f"{calibration.model_rows_per_s:,.0f} rows/s; {calibration.load_s:.0f} s to load"),
            ("digests and disk", f"{calibration.disk_rows_per_s:,.0f} rows/s, beside the model"),
            ("peak memory", output.size(calibration.peak_bytes)),
        ]
        if calibration.device_peak_bytes:
            lines.append(("peak GPU memory", output.size(calibration.device_peak_bytes)))
    if found.seconds is not None and found.rows_until is not None:
        lines.append(("time", f"{timedelta(seconds=round(found.seconds))} (hours:minutes:seconds)"))
        lines.append((f"by {found.until:%H:%M}", f"{found.rows_until:,} rows if it begins now"))
    for name, text in lines:
        click.echo(f"{name:24} {text}")
    click.echo(f"to capture it:\n  {command_line('capture', ONLY_HERE, found.request.rows)}")
