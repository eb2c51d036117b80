"""Training numbers in TensorBoard, wandb or trackio: the lines of metrics.jsonl, which stays the truth.

A series is begun anew from metrics.jsonl whenever a fit starts or goes on, and replaces what an interrupted fit left:
what is shown is what the file holds. Nothing goes over the network unless the package's own settings ask for it
(WANDB_MODE=online, TRACKIO_SPACE_ID): wandb is offline and trackio local.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from actstore.errors import UsageError
from trainer.checkpoint import Run, read_run, runs_folder
from trainer.config import config_json
from trainer.fit import FitProgress
from trainer.saved import read_metrics

PROJECT = "actstore"  # wandb's and trackio's name for all runs


class Logger(NamedTuple):
    """The series of one run in somebody else's viewer.

    Args:
        log: adds numbers at a step, which is never before the last one.
        close: writes out what is left.
    """

    log: Callable[[int, dict[str, float]], object]
    close: Callable[[], object]


def _tensorboard(run: Run, folder: Path) -> Logger:
    """Event files below RUNS/tensorboard/<run>; `purge_step` tells readers to drop what earlier ones say."""
    module = importlib.import_module("torch.utils.tensorboard")
    writer = module.SummaryWriter(str(folder / "tensorboard" / _name(run)), purge_step=0, flush_secs=20)
    writer.add_text("run", f"```json\n{json.dumps(_about(run), indent=1, sort_keys=True)}\n```")
    return Logger(lambda step, numbers: [writer.add_scalar(n, value, step) for n, value in numbers.items()], writer.close)


def _wandb(run: Run, folder: Path) -> Logger:
    """An offline run below RUNS/wandb, complete in itself; `wandb sync` uploads it when the user wants that."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its crashes are reported over the network
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings(
        console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
        x_disable_machine_info=True,
    )  # fmt: skip
    series = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT, dir=folder, id=run.digest, name=_name(run), config=_about(run),
        mode=mode, resume="allow" if mode == "online" else None, reinit="create_new", settings=settings,
    )  # fmt: skip
    first = series.step  # online, the server has the steps before
    return Logger(lambda step, numbers: step >= first and series.log(numbers, step=step), series.finish)


def _trackio(run: Run, folder: Path) -> Logger:
    """A run of trackio's local database; its messages go to stderr."""
    trackio = importlib.import_module("trackio")
    name = _name(run)
    with contextlib.redirect_stdout(sys.stderr), _hub_offline():
        with contextlib.suppress(ValueError):  # no such project yet
            for old in [old for old in trackio.Api().runs(PROJECT) if old.name == name]:
                old.delete()
        # In a context of its own: trackio ends the run before in the same one, and a fleet has several at once.
        series = contextvars.copy_context().run(
            trackio.init, PROJECT, name, config=_about(run), embed=False, auto_log_cpu=False, auto_log_gpu=False
        )

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            series.finish()

    return Logger(lambda step, numbers: series.log(numbers, step=step), close)


LOGGERS: dict[str, Callable[[Run, Path], Logger]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep trackio from asking the hub who the user is, unless the user sends the numbers to a Space."""
    constants = importlib.import_module("huggingface_hub").constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or "TRACKIO_SPACE_ID" not in os.environ
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _name(run: Run) -> str:
    c = run.config
    return f"{c.arch}-n{c.n_latents}-k{c.k}-seed{c.seed}-{run.digest[:12]}"


def _about(run: Run) -> dict[str, Any]:
    about = {"run": run.digest, "store": run.store, "content_digest": run.content_digest, "model": run.model}
    return {**config_json(run.config), **about, "hook": run.key["hook"]}


@contextlib.contextmanager
def log_to(name: str, runs: Path | str | None = None, progress: FitProgress | None = None) -> Iterator[FitProgress]:
    """Yield callbacks for `fit` that also log each line of metrics, and at the end the held-out numbers.

    Args:
        name: "tensorboard" (RUNS/tensorboard), "wandb" (RUNS/wandb) or "trackio" (its own folder).
        runs: folder of runs, the one given to `fit`; default $ACTSTORE_RUNS, else ./runs.
        progress: callbacks that are called as well.

    Raises: UsageError: no such logger, or its package is not installed; nothing has been trained then.
    Example:
        with log_to("tensorboard") as progress:
            fit(store, FitConfig(k=(16, 32)), progress=progress)
    """
    if name not in LOGGERS:
        raise UsageError(f"there is no logger {name!r}", do=f"choose one of {', '.join(LOGGERS)}")
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"--log {name} needs the package {name}, which is not installed", do=f"pip install {name}")
    kind, folder, inner = LOGGERS[name], runs_folder(runs), progress or FitProgress()
    current: list[tuple[Path, Logger]] = []
    last: dict[Path, int] = {}

    def start(about: dict[str, Any]) -> None:
        end()
        inner.on_start(about)
        for digest in about["runs"]:
            run = read_run(folder / digest)
            logger = kind(run, folder)
            current.append((run.path, logger))
            for line in read_metrics(run.path):
                log(run.path, logger, line)

    def log(path: Path, logger: Logger, line: dict[str, float]) -> None:
        step = int(line.get("step", 0))
        if step > last.get(path, 0):
            last[path] = step
            logger.log(step, {name: value for name, value in line.items() if name != "step"})

    def step(rows: int, latest: list[dict[str, float]]) -> None:
        inner.on_step(rows, latest)
        for (path, logger), line in zip(current, latest, strict=True):
            log(path, logger, line)

    def end() -> None:
        while current:
            path, logger = current.pop()
            with contextlib.ExitStack() as stack:
                stack.callback(logger.close)
                numbers = {f"held_out/{n}": v for n, v in read_run(path).held_out.items() if isinstance(v, int | float)}
                if numbers:
                    logger.log(last.get(path, 0), numbers)

    try:
        yield FitProgress(start, step, inner.stop)
    finally:
        end()
