"""`trainer label`: labels of latents, by pattern or by a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from . import output
from .evaluating import open_runs, sources_of
from .looking import ASKED
from .options import RUN, Commas, Count, option, with_options


@click.command("label")
@with_options(
    RUN,
    option("--latents", type=Commas(int, "integer"), metavar="I,…", help="Label these latents, comma list, counted from 0.  [default: as --top says]"),
    option("--top", type=Count(), metavar="LATENTS", help="Label those of largest activation, so many.  [default: all; 50 with --endpoint]"),
    option("--endpoint", metavar="URL", help="OpenAI-compatible server, such as http://127.0.0.1:8000; key: $OPENAI_API_KEY."),
    option("--model-name", metavar="NAME", help="The model's name at the endpoint."),
    option("--detect", is_flag=True, help="Have the model judge its labels: which of 20 contexts activate the latent?"),
    option("--parallel", type=click.IntRange(1, 64), metavar="LATENTS", default=4, help="Latents asked about at once."),
    option("--timeout", type=click.FloatRange(1, 3600), metavar="SECONDS", default=120, help="How long one answer may take."),
    ASKED,
)  # fmt: skip
@output.command
def label_command(
    run: str, latents: tuple[int, ...] | None, top: int | None, endpoint: str | None, model_name: str | None, detect: bool,
    parallel: int, timeout: float, stores: Path, runs: Path, as_json: bool, **asked: Any,
) -> None:  # fmt: skip
    """Label the latents of a finished run, and keep the labels in it: reports and `trainer features` show them.

    Without --endpoint a label is the simplest pattern that a latent's contexts share, offline. With it, a model gets the
    contexts and writes one; labels it has written are not asked for again, and Ctrl-C keeps those that are done. The
    score beside a label is a balanced accuracy: 0.5 is a guess, 1 is perfect.
    """
    from actstore.errors import UsageError
    from trainer.judge import Endpoint
    from trainer.labelling import label_by_model, label_by_pattern
    from trainer.labels import Label
    from trainer.scan import features_of

    if latents is not None and top is not None:
        raise UsageError("--latents and --top are two choices of latents", do="give one of them")
    if (endpoint is None) != (model_name is None) or (detect and endpoint is None):
        do = "give --endpoint URL --model-name NAME [--detect]"
        raise UsageError("--endpoint, --model-name and --detect go together", do=do)
    judge = Endpoint(endpoint, model_name, timeout) if endpoint and model_name else None
    (found,), opener = open_runs((run,), runs), partial(sources_of, stores=stores)
    with output.counting("features", "row") as on_rows:
        (features,) = features_of([found], opener, on_rows=on_rows, **asked)
    order = [int(i) for i in (-features.maxima).argsort(kind="stable") if features.maxima[i] > 0]
    chosen = latents if latents is not None else order[: top or (50 if judge else None)]
    failed: dict[str, str] = {}
    with output.progress("label", len(chosen), "latent") as bar:

        def on_label(latent: int, label: Label | None, problem: str) -> None:
            if label is None:
                failed[str(latent)] = problem
            bar.update(1)

        if judge is None:
            labels = label_by_pattern(features, opener(found), chosen, on_label)
        else:
            labels = label_by_model(features, opener(found), chosen, judge, scored=detect, parallel=parallel, on_label=on_label)
    for latent, problem in failed.items():
        output.note(f"latent {latent} has no label: {problem}")
    if as_json:
        output.print_json({"run": found.digest, "labels": [x.model_dump() for x in labels], "failed": failed})
        return
    rows = [[str(x.latent), _short(x.balanced_accuracy), _short(x.f1), str(x.judged or ""), x.text] for x in labels]
    output.print_table(["latent", "score", "F1", "of", "label"], rows)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
