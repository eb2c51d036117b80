"""`trainer`: train SAEs from stores, and look at them."""

from __future__ import annotations

import re

import click

from . import output
from .complete import completion_command
from .evaluating import compare_command, evaluate_command, info_command, ls_command, rm_command
from .fitting import archs_command, fit_command
from .labelling import label_command
from .looking import features_command, report_command
from .options import Commands
from .sharing import export_command, import_command, push_command


def _check_clash() -> None:
    """Refuse to run when another distribution owns the import name `trainer` too (Coqui's is on PyPI)."""
    from importlib.metadata import distributions

    # `packages_distributions` would say it too, but parses all that is installed: 0.15 s of every command.
    owns = re.compile(r"^trainer(/|\.py\b|$)", re.MULTILINE)
    parts = [part for part in distributions() if owns.search(part.read_text("top_level.txt") or part.read_text("RECORD") or "")]
    others = {part.metadata["Name"] for part in parts} - {"actstore"}
    if others:
        from actstore.errors import UsageError

        raise UsageError(
            f"the import package 'trainer' also belongs to {', '.join(sorted(others))}, which overwrites ours",
            do=f"pip uninstall {' '.join(sorted(others))} && pip install --force-reinstall --no-deps actstore",
        )


@click.group("trainer", cls=Commands)
@click.version_option(package_name="actstore")
@output.command
def main() -> None:
    """Train any number of sparse autoencoders from one pass over an activation store; look at them, export them.

    First: `trainer fit --store HASH --k 16,32,64`, then `trainer report RUN...`, `trainer export RUN --format saelens --out FOLDER`.
    """
    _check_clash()


for _command in (
    fit_command, archs_command, ls_command, info_command, evaluate_command, compare_command, features_command, report_command,
    label_command, export_command, import_command, push_command, rm_command, completion_command,
):  # fmt: skip
    main.add_command(_command)
