"""Options and arguments that several commands share, numbers as people write them, and the group that says what to do next."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from . import complete

F = TypeVar("F", bound=Callable[..., Any])
EXIT_CODES = """Exit codes: 0 done, 1 store damaged, 2 usage, 3 corpus, key or activations, 4 locked, 5 not found, not sealed or not
finished, 6 disk full, storage failed or a rank lost, 7 format, 8 training diverged, 70 a bug of ours, 130 Ctrl-C, 143 SIGTERM."""
LIST_STORES, LIST_RUNS = "`actstore ls` lists the stores", "`trainer ls` lists the runs"
NEXT = {  # what to do after what click says
    "unexpected extra argument": "repeat an option for each value (--corpus A --corpus B); a comma list has no spaces (--k 16,32)",
    "'HASH'": LIST_STORES, "'--store'": LIST_STORES, "'RUN": LIST_RUNS, "'URL'": "give s3://BUCKET/PREFIX or file:///FOLDER",
}  # fmt: skip


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number, also as 4k, 2.5M or 1e6."""

    name = "count"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([kM]?)", str(value))
        number = Decimal(found[1]) * {"": 1, "k": 1000, "M": 1_000_000}[found[2]] if found else Decimal(-1)
        if number != int(number) or number < self.least:
            self.fail(f"{value!r} is no whole number of {self.least} or more, such as 4000, 4k or 1e6.", param, ctx)
        return int(number)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as 8GB."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if ctx and ctx.resilient_parsing:  # a TAB
            return 0
        from actstore.errors import UsageError
        from actstore.forecast import parse_budget

        try:
            size = parse_budget(value).bytes
        except UsageError:
            size = None
        return int(size) if size else self.fail(f"{value!r} is no number of bytes, such as 8GB or 512MiB.", param, ctx)


class Place(click.ParamType):  # type: ignore[type-arg]
    """A folder of stores, or with `urls` a bucket's URL, as it is."""

    name = "folder"

    def __init__(self, urls: bool) -> None:
        self.urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Return the folder, or the URL."""
        if "://" not in str(value):
            return Path(value)
        if not self.urls:  # not repeated: it may hold a password
            do = "`actstore ls URL`, `actstore pull HASH URL`, `trainer fit --store URL#HASH`"
            self.fail(f"this command works on a folder: {do}", param, ctx)
        return str(value)


class Commas(click.ParamType):  # type: ignore[type-arg]
    """A comma list of one type, such as 16,32,64; `auto` for none."""

    def __init__(self, kind: type[Any], name: str, auto: bool = False) -> None:
        self.kind, self.name, self.auto = kind, name, auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...] | None:
        """Return the list's values."""
        if self.auto and value == "auto":
            return None
        try:
            return value if isinstance(value, tuple) else tuple(self.kind(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is no comma list of {self.name}s, such as 16,32.", param, ctx)


class Commands(click.Group):
    """A group whose usage errors end with what to do next."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, **settings
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            said = error.format_message()
            do = [hint for words, hint in NEXT.items() if words in said]
            if wrong := re.match(r"No such command '(\w+)'", said):
                other = {"actstore": "trainer", "trainer": "actstore"}[str(self.name)]
                known = import_module(f"{__package__}.{other}").main.commands
                do = [f"`{other} {wrong[1]}` is a command"] if wrong[1] in known else []
            raise click.UsageError("\n  do: ".join([said, *do]), error.ctx) from None


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """Return an option that shows its default."""
    return click.option(*names, **{"show_default": True, **settings})


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds options in the order in which they are shown."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def command_line(command: str, without: dict[str, int], rows: int | None) -> str:
    """Return this process's command line as one of another command, with another number of rows.

    Args:
        command: the command's name.
        without: options to leave out, and how many words follow each.
        rows: for --rows; None leaves it out.
    """
    words, kept = sys.argv[2:], []
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name not in {"--rows": 1, **without}:
            kept.append(word)
        elif not equals:
            del words[: {"--rows": 1, **without}[name]]
    return shlex.join(["actstore", command, *kept, *([] if rows is None else ["--rows", str(rows)])])


PATH = click.Path(path_type=Path)
JSON = option("--json", "as_json", is_flag=True, show_default=False, help="Print exactly one JSON object on stdout.")
STORES = option("--stores", type=Place(False), metavar="FOLDER", envvar="ACTSTORE_STORES", default="stores", help="Folder of stores (or $ACTSTORE_STORES).")  # fmt: skip
STORES_OR_URL = option("--stores", type=Place(True), metavar="FOLDER|URL", envvar="ACTSTORE_STORES", default="stores", help="Folder of stores (or $ACTSTORE_STORES), or s3://BUCKET/PREFIX, gs, az, file: straight into a bucket.")  # fmt: skip
RUNS = option(
    "--runs",
    type=PATH,
    metavar="FOLDER",
    envvar="ACTSTORE_RUNS",
    default=Path("runs"),
    help="Folder of runs (or $ACTSTORE_RUNS).",
)
DEVICE = option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    help="Where it is computed; auto is CUDA where there is one.",
)
HASH = click.argument("hash_", metavar="HASH", shell_complete=complete.stores)
YES = option("--yes", is_flag=True, help="Do not ask; without a terminal nothing is asked.")
RUN = click.argument("run", metavar="RUN", shell_complete=complete.runs)
MANY_RUNS = click.argument("run", metavar="RUN...", nargs=-1, required=True, shell_complete=complete.runs)
