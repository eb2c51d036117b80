"""The one place that prints, draws progress, and turns an error into a message and an exit code."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import re
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

if TYPE_CHECKING:  # a TAB and --help do not wait for them
    from rich.text import Text
    from tqdm import tqdm

P = ParamSpec("P")
R = TypeVar("R")
_speaker = ""  # what notes begin with
_bars: list[tqdm[Any]] = []  # live on the terminal
LINE_SECONDS = 30.0  # without a terminal a progress bar is one line this often


class TerminatedError(BaseException):
    """SIGTERM arrived: like KeyboardInterrupt, so that `finally` blocks finish the file in hand."""


def _terminate(number: int, frame: object) -> None:
    raise TerminatedError


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: user errors become their message and exit code, Ctrl-C and SIGTERM 130 and 143, bugs 70."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not faulthandler.is_enabled() and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)  # a file cut short while it is mapped ends in SIGBUS: say where
        with contextlib.suppress(ValueError):  # not in the main thread: a test
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, TerminatedError) as error:
            note("interrupted: what was committed is kept; run the same command again to go on")
            code = 130 if isinstance(error, KeyboardInterrupt) else 143
        except click.Abort:
            note("nothing was done")
            code = 130
        except BrokenPipeError:
            os._exit(128 + signal.SIGPIPE)  # at once: Python would fail again when it flushes stdout at exit
        except (click.exceptions.Exit, click.ClickException):
            raise
        except Exception as error:  # noqa: BLE001 - the one place that ends in a traceback: a bug of ours
            from actstore.errors import ActstoreError

            if isinstance(error, ActstoreError):
                note(f"{type(error).__name__}: {error}")
            else:
                traceback.print_exc()
                note("this is a bug in actstore: please report the lines above, and what `actstore doctor` prints")
            code = getattr(error, "exit_code", 70)
        sys.exit(code)

    return run


def print_json(value: dict[str, Any]) -> None:
    """Print exactly one JSON object on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True))


def visible(text: str, keep: str = "") -> str:
    """Return a text of others without what a terminal would obey: control, format and unassigned characters.

    Example:
        >>> visible("a\\n\\x1b[31m\\u202e")
        'a⏎�[31m�'
    """
    shown = {"\n": "⏎", "\t": "⇥"} | {c: c for c in keep}
    return "".join(shown.get(c, "�" if unicodedata.category(c)[0] == "C" else c) for c in text)


def line(text: str) -> None:
    """Print one or more lines on stdout."""
    click.echo(visible(text, keep="\n"))


def note(text: str) -> None:
    """Print a line for the person watching, on stderr. A terminal that is gone, or a full disk, is no reason to stop."""
    text = visible(text, keep="\n\t")
    with contextlib.suppress(OSError):
        for bar in _bars:
            bar.clear()
        click.echo(_speaker + text.lstrip("\n") if _speaker else text, err=True)
        for bar in _bars:
            bar.refresh()


@contextlib.contextmanager
def speaking_as(name: str) -> Iterator[None]:
    """Begin every note with a name: one of several processes that share a terminal. It stays after an error, which is noted."""
    global _speaker
    _speaker = name
    yield
    _speaker = ""


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout, numbers to the right; never a cut cell: in a pipe it is as wide as it likes, and a terminal that is
    too narrow for it gets broken lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, *cells in zip(columns, *rows, strict=True):
        numbers = all(re.fullmatch(r"(-?\d+(\.\d+)?(e[-+]\d+)?%?)?", cell) for cell in cells)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell, keep="\n")) for cell in row))  # as it is: a cell such as [/b] would be read as markup
    least = Console(width=10_000).measure(table).minimum
    Console(width=max(Console().width, least) if sys.stdout.isatty() else max(240, least)).print(table, crop=False)


def print_text(text: Text) -> None:
    """Print styled text on stdout, wrapped and coloured on a terminal alone."""
    from rich.console import Console

    Console(soft_wrap=not sys.stdout.isatty(), highlight=False).print(text)


class _Lines:
    """stderr for a bar without a terminal: each refresh is a line of its own."""

    def write(self, text: str) -> None:
        """Write what is not blank, as one line."""
        if line := text.strip():
            note(line)

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is written."""


def confirm(question: str, sure: bool) -> None:
    """Ask somebody at a terminal before something is gone; a "no" ends the command."""
    if not sure and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str, silent: bool = False) -> Iterator[tqdm[Any]]:
    """Yield a progress bar on stderr: live on a terminal, one line every 30 s elsewhere; gone after an error, and if nothing was done."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    with tqdm(
        total=total, desc=description, unit=unit, unit_scale=True, file=sys.stderr if live else _Lines(), dynamic_ncols=live,
        ncols=None if live else 110, mininterval=0.2 if live else LINE_SECONDS, maxinterval=10.0 if live else LINE_SECONDS,
        delay=1e-9, disable=silent,
    ) as bar:  # fmt: skip
        if live and not silent:
            _bars.append(bar)
        try:
            yield bar
            bar.leave = bar.leave and bar.n > 0
        except BaseException:
            bar.leave = False
            raise
        finally:
            _bars.clear()


@contextlib.contextmanager
def counting(description: str, unit: str, more: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows, on a bar, how many are done of how many; with `more`, how many since it was called last."""
    with progress(description, None, unit) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done if more else done - bar.n)

        yield show


def size(n_bytes: float) -> str:
    """Return a size in bytes with three digits and a decimal unit.

    Example:
        >>> size(1536), size(2_500_000_000)
        ('1.54 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError
