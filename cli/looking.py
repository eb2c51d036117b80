"""`trainer features` and `trainer report`: what latents fire on, in the terminal and as a page."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import complete, output
from .evaluating import open_runs, sources_of
from .options import DEVICE, JSON, MANY_RUNS, PATH, RUN, RUNS, STORES, Count, option, with_options

if TYPE_CHECKING:
    from rich.text import Text

    from trainer.features import Features
    from trainer.latents import Context, Latent

ASKED = with_options(  # the options of a pass over the rows, each an argument of `features_of`
    option("--rows", type=Count(), metavar="ROWS", help="Rows of the store to look at, the first ones.  [default: what is there already, else 300000]"),
    option("--model", metavar="FOLDER|ID", shell_complete=complete.folder, help="The store's model (folder or hub id): adds the tokens a latent promotes."),
    option("--corpus", multiple=True, type=PATH, metavar="PATH", show_default=False, help="The store's corpus: adds the subsets a latent fires in."),
    option("--subset-field", metavar="FIELD", default="meta.pile_set_name", help="Field of a corpus record that names its subset; dots reach into objects."),
    DEVICE, STORES, RUNS, JSON,
)  # fmt: skip


@click.command("features")
@with_options(
    RUN,
    option("--latent", type=Count(0), metavar="I", help="Show this latent, counted from 0: where it fires, with which others, what it writes.  [default: the strongest]"),
    option("--search", metavar="TEXT", help="List the latents that fire on this text, wherever it stands in the rows looked at."),
    option("--contexts", type=click.IntRange(1, 10), metavar="CONTEXTS", default=5, help="Contexts to show: strongest ones, and as many by quantile."),
    ASKED,
)  # fmt: skip
@output.command
def features_command(
    run: str, latent: int | None, search: str | None, contexts: int, stores: Path, runs: Path, as_json: bool, **asked: Any
) -> None:
    """Show what latents of a finished run fire on. Without --latent and --search: the run's strongest latents.

    The first time this takes one pass over the store; the result is kept in the run. The first position of each
    sequence and massive rows (norm over 10 medians) are left out.
    """
    from trainer.features import search_latents
    from trainer.labels import shown_labels
    from trainer.scan import features_of

    (found,), opener = open_runs((run,), runs), partial(sources_of, stores=stores)
    with output.counting("features", "row") as on_rows:
        (features,) = features_of([found], opener, on_rows=on_rows, **asked)
    store, labels = opener(found).first, shown_labels(found)
    about = {"run": found.digest, **features.record.model_dump()}
    if latent is not None:
        one = features.latent(latent, store)
        if as_json:
            output.print_json({**about, "latent": asdict(one), "label": labels.get(latent)})
        else:
            _show(features, one, contexts, labels.get(latent, ""))
        return
    hits = search_latents(features, store, search) if search is not None else [(int(i), 0) for i in (-features.maxima).argsort()]
    some = [(features.latent(i, store), n) for i, n in hits[:20]]
    if as_json:
        listed = [
            {"latent": x.index, "contexts_with_text": n, "density": x.density, "maximum": x.maximum, "label": labels.get(x.index)}
            for x, n in some
        ]
        output.print_json({**about, "latents": listed})
        return
    table = [[str(x.index), str(n or ""), f"{x.density:.3%}", f"{x.maximum:.4g}", " ".join(repr(c.tokens[c.peak]) for c in x.strongest[:5]), labels.get(x.index, "")]
             for x, n in some]  # fmt: skip
    output.print_table(["latent", "contexts with text", "density", "largest", "strongest on", "label"], table)
    said = f"{len(hits)} latents" if hits else "no latents: no kept context is about this text"
    output.note(f"{said}; `trainer features {found.digest[:12]} --latent I` shows one")


def _show(features: Features, latent: Latent, contexts: int, label: str) -> None:
    """Print a latent."""
    from rich.text import Text

    record = features.record
    output.print_text(Text(f"latent {latent.index}  {label}", style="bold"))
    output.print_text(Text(
        f"active on {latent.density:.4%} of {record.rows_counted} rows, in {latent.documents} documents; largest {latent.maximum:.4g}, "
        f"mean {latent.mean:.4g}\nleft out: positions below {record.skip_positions} and massive rows\n", style="dim"))  # fmt: skip
    lines = {
        "activations": f"0 {_bars(latent.counts)} {latent.maximum:.4g}",
        "nearest": "  ".join(f"{i} {v:.2f}" for i, v in latent.neighbours),
        "active with": "  ".join(f"{i} {v:.2f}" for i, v in latent.coactive),
        "promotes": "  ".join(repr(token) for token, _ in latent.promoted),
        "suppresses": "  ".join(repr(token) for token, _ in latent.suppressed),
        "subsets": "  ".join(f"{output.visible(name)} {share:.0%}" for name, share in list(latent.subsets.items())[:5]),
    }
    for name, line in lines.items():
        if line:
            output.print_text(Text.assemble((f"{name:13}", "dim"), line))
    if record.logits is None:
        output.note("what it promotes is left out: --model FOLDER adds it")
    names = ("top fifth of its activations", "second fifth", "third fifth", "fourth fifth", "lowest fifth")
    parts = [latent.strongest[:contexts], *latent.by_quantile(5, max(1, contexts // 3))]
    for name, part in zip(("strongest, one a document", *names), parts, strict=True):
        if part:
            output.print_text(Text(f"\n{name}", style="bold"))
        for context in part:
            output.print_text(_strip(context, latent.maximum))


def _bars(counts: list[int]) -> str:
    """Return a histogram as a line of blocks.

    Example:
        >>> _bars([1, 4, 8, 0])
        '▁▄█'
    """
    used = counts[: max((i + 1 for i, n in enumerate(counts) if n), default=0)]
    return "".join(" " if not n else "▁▂▃▄▅▆▇█"[max(0, -(-8 * n // max(used)) - 1)] for n in used)


def _strip(context: Context, most: float) -> Text:
    """Return a context with its tokens on a background that says how strongly the latent is active on each."""
    from rich.text import Text

    strip = Text(f"{context.value:8.4g}  ")
    for i, (token, value) in enumerate(zip(context.tokens, context.activations, strict=True)):
        share = min(1.0, value / most) if most else 0.0
        style = f"#201400 on #ff{int(240 - 110 * share):02x}{int(190 - 160 * share):02x}" if share > 0 else ""
        strip.append(output.visible(token), style + (" bold underline" if i == context.peak else ""))
    return strip


@click.command("report")
@with_options(
    MANY_RUNS,
    option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="HTML file to write.  [default: RUNS/report-<first run>.html]"),
    ASKED,
)  # fmt: skip
@output.command
def report_command(run: tuple[str, ...], out: Path | None, stores: Path, runs: Path, as_json: bool, **asked: Any) -> None:
    """Write one self-contained HTML page about finished runs, with a page for every latent, and print its path."""
    from trainer.labels import shown_labels
    from trainer.report import write_report

    found = open_runs(run, runs)
    target = out or runs / f"report-{found[0].digest[:12]}.html"
    with output.counting("features", "row") as on_rows:
        write_report(
            found,
            partial(sources_of, stores=stores),
            target,
            labels={r.digest: shown_labels(r) for r in found},
            on_rows=on_rows,
            **asked,
        )
    if as_json:
        output.print_json({"report": str(target), "bytes": target.stat().st_size, "runs": [r.digest for r in found]})
    else:
        click.echo(str(target))
