"""Every command explains itself: help, units, defaults, `--json`, a manual that is current, and a way on after a mistake."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import click
import pytest
from actstore_cli.actstore import main as actstore_main
from actstore_cli.options import Commas, Count, Size
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from helpers import ROOT

COMMANDS = [
    (f"{group.name} {name}", command) for group in (actstore_main, trainer_main) for name, command in group.commands.items()
]
OPTIONS = [
    pytest.param(option, name, id=f"{name} {option.opts[0]}")
    for name, command in COMMANDS for option in command.params if isinstance(option, click.Option)
]  # fmt: skip
COUNTS = {"N", "N,…", "I", "I,…"}  # plain numbers; every other metavar of a number is its unit
NUMBERS = Count | Size | click.types.IntParamType | click.types.FloatParamType | click.types.IntRange | click.types.FloatRange


def is_number(option: click.Option) -> bool:
    kind = option.type
    return isinstance(kind, NUMBERS) or (isinstance(kind, Commas) and kind.kind is not str)


@pytest.mark.parametrize("name, command", COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_says_what_it_does_and_prints_json(name, command):
    first = (command.help or "").strip().split("\n")[0]
    assert len(first) > 20 and "--json" in {o for p in command.params for o in p.opts}
    shown = CliRunner().invoke(command, ["--help"], terminal_width=110)
    assert shown.exit_code == 0 and "HASH_" not in shown.output and " TEXT" not in shown.output.replace("--search TEXT", "")


@pytest.mark.parametrize("option, name", OPTIONS)
def test_every_option_has_a_help_its_unit_and_its_default(option, name):
    text = option.get_help_record(click.Context(click.Command(name)))
    assert text and option.help, name
    if is_number(option):
        assert re.fullmatch("[A-Z]+(,…)?", option.metavar or ""), f"{name} {option.opts[0]} does not say its unit"
        assert option.metavar in COUNTS or len(option.metavar) > 3
        assert "default: " in text[1], f"{name} {option.opts[0]} does not show its default"
    if isinstance(option.type, click.Choice):
        assert "default: " in text[1]
    given = option.to_info_dict()["default"]
    if not (option.is_flag or option.multiple or option.required) and given is not None:
        assert "default: " in text[1]


def test_the_checks_above_see_a_bare_option():
    bare = click.Option(["--rows"], type=int, help="Rows.")
    with pytest.raises(AssertionError, match="unit"):
        test_every_option_has_a_help_its_unit_and_its_default(bare, "x")


def test_the_manual_is_current():
    written = (ROOT / "docs" / "cli.md").read_text()
    assert written == runpy.run_path(str(ROOT / "docs" / "manual.py"))["manual"](), "run: python docs/manual.py"
    assert all(f"### {name}\n" in written for name, _ in COMMANDS)


def test_commands_and_help_import_nothing_heavy():
    code = (
        "import sys, actstore_cli.actstore, actstore_cli.trainer;"
        "assert not {'torch', 'zarr', 'datasets', 'numpy', 'pydantic', 'rich', 'tqdm'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "main, args, says",
    [
        (actstore_main, "lst", "Did you mean 'ls'"),
        (actstore_main, "fit", "`trainer fit` is a command"),
        (trainer_main, "capture", "`actstore capture` is a command"),
        (actstore_main, "capture --modle x", "Did you mean '--model'"),
        (actstore_main, "info", "`actstore ls` lists the stores"),
        (trainer_main, "fit", "`actstore ls` lists the stores"),
        (trainer_main, "compare", "`trainer ls` lists the runs"),
        (actstore_main, "capture --corpus a.jsonl b.jsonl", "--corpus A --corpus B"),
        (actstore_main, "capture --rows 4x", "such as 4000, 4k or 1e6"),
        (actstore_main, "capture --rows 1.5", "no whole number"),
        (actstore_main, "push 3fa9", "s3://BUCKET/PREFIX"),
        (actstore_main, "ls some/folder", "file://"),
        (trainer_main, "fit --store 3fa9 --lr fast", "Invalid value for '--lr'"),
        (trainer_main, "fit --store 3fa9 --cache-size lots", "8GB"),
        (trainer_main, "info 0", "`trainer ls` runs"),
    ],
)
def test_a_mistake_is_answered_with_what_to_do(main, args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, args.split())
    assert result.exit_code == 2 and says in result.stderr and result.stdout == "", result.stderr


def test_a_mistyped_digest_is_answered_with_the_nearest(toy_store, tmp_path):
    wrong = toy_store.digest[:6] + ("0" if toy_store.digest[6] != "0" else "1")
    result = CliRunner().invoke(actstore_main, ["info", wrong, "--stores", str(toy_store.path.parent)])
    assert result.exit_code == 5 and f"nearest: {toy_store.digest[:7]}" in result.stderr


def test_a_count_may_be_written_short():
    count = Count()
    assert [count.convert(text, None, None) for text in ("4000", "4k", "2.5M", "1e6", "1_000", 7)] == [
        4000,
        4000,
        2_500_000,
        1_000_000,
        1000,
        7,
    ]


def test_ctrl_c_at_a_question_is_130_and_changes_nothing(toy_store):
    """On a real terminal."""
    import os
    import pty

    above, below = pty.openpty()
    command = [sys.executable, "-c", "from actstore_cli.actstore import main; main()", "rm", toy_store.digest]
    process = subprocess.Popen([*command, "--stores", toy_store.path.parent], stdin=below, stderr=subprocess.PIPE)
    os.write(above, b"n\n")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"nothing was done" in err and toy_store.path.is_dir()
