"""What `trainer fit` needs of the command line: named values, and a progress bar that stops between steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from trainer.fit import FitProgress


def named_values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return NAME=VALUE pairs as a dict; a value that is a number, true or false becomes one.

    Example:
        >>> named_values(("bandwidth=0.01", "penalty=tanh", "multi_topk=true"))
        {'bandwidth': 0.01, 'penalty': 'tanh', 'multi_topk': True}
    """
    from actstore.digests import parse_json
    from actstore.errors import FormatError, UsageError

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--option {pair!r} is not NAME=VALUE", do="write it as --option bandwidth=0.01")
        try:
            value = parse_json(text.encode(), f"--option {name}")
        except FormatError:
            value = text
        found[name.strip()] = value if isinstance(value, bool | int | float) else text
    return found


FEW_STEPS = 100  # fewer are a trial


@contextlib.contextmanager
def fleet_progress(then: str = "writing a checkpoint", rank: int = 0, world: int = 1) -> Iterator[FitProgress]:
    """Yield callbacks that draw one bar, and stop between steps at the first Ctrl-C or SIGTERM (the second is at once).

    Args:
        then: what is said to come after the stop.
        rank: of this process; only rank 0 draws.
        world: how many ranks there are; with more than one, what each has to say begins with its number.
    """
    from trainer.fit import FitProgress
    from trainer.kernels import compiled

    wanted: list[BaseException] = []

    def ask(number: int, frame: object) -> None:
        if wanted and number == signal.SIGTERM and world > 1:
            return  # once from Slurm, once from torchrun
        if wanted:
            raise KeyboardInterrupt
        wanted.append(KeyboardInterrupt() if number == signal.SIGINT else output.TerminatedError())
        output.note(f"\nstopping after this step: {then}")

    with output.speaking_as(f"rank {rank}: " if world > 1 else ""), output.progress("fit", None, "row", rank > 0) as bar:

        def start(about: dict[str, Any]) -> None:
            bar.total, bar.n = about["rows"], about["first_step"] * about["batch_size"]
            for complaint in about["complaints"]:
                output.note(complaint)
            if rank:
                return
            output.note(
                f"{about['saes']} SAEs, {about['steps']} steps of {about['batch_size']} rows, {about['train_rows']} rows to train on, "
                f"{about['held_out_rows']} held out; {about['device']}, {'/'.join(about['kernels'])} kernel; "
                f"{about['companions']:.2f} same-document rows a batch and row (ideal {about['ideal_companions']:.2f})"
                + (f"; pass {about['pass']} of {about['passes']}: not all fit into memory" if about["passes"] > 1 else "")
                + (f"; going on at step {about['first_step']}" if about["first_step"] else "")
            )
            if not about["locked"]:
                output.note("the store is not locked, because its folder cannot be written: do not remove it meanwhile")
            if "cpu" in about["kernels"] and not compiled.cache()[1]:
                output.note("the first fit on a machine compiles its loops, for a minute or two; later ones begin at once")
            if about["steps"] < FEW_STEPS:
                output.note(
                    f"an SAE learns little in {about['steps']} steps: give more --epochs, a smaller --batch-size, or more rows"
                )

        def step(rows: int, latest: list[dict[str, float]]) -> None:
            shown = [numbers for numbers in latest if numbers]
            if shown:
                names = [n for n in ("loss", "l0", "fvu", "dead_fraction") if n in shown[0]]
                text = {n: "/".join(f"{s[n]:.3g}" for s in shown[:4]) for n in names}
                bar.set_postfix({"dead" if n == "dead_fraction" else n: t for n, t in text.items()}, refresh=False)
            bar.update(rows)

        before = {}
        with contextlib.suppress(ValueError):  # not in the main thread
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield FitProgress(start, step, lambda: wanted[0] if wanted else None)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
