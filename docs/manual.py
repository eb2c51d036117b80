"""Write docs/cli.md, the manual of both commands, from their own --help: `python docs/manual.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click
from actstore_cli.actstore import main as actstore
from actstore_cli.options import EXIT_CODES
from actstore_cli.trainer import main as trainer

HEAD = """# actstore and trainer: the manual

Written by `python docs/manual.py` from the commands' own `--help`; a test keeps it current. What belongs together in the first
hour is in the [README](../README.md).

- Results go to stdout; progress, notes and errors to stderr. `--json` makes stdout exactly one JSON object; after an error it
  is empty.
- A digest may be cut to any unique beginning of 4 digits or more. TAB completes it: `actstore completion --help`.
- Counts may be written 4000, 4k, 2.5M or 1e6; sizes 8GB, 512MiB. A row is one token's activation.
- Ctrl-C and SIGTERM keep what was committed; the same command goes on.
- Without a terminal a progress bar is one line every 30 s.
"""
ENVIRONMENT = {
    "ACTSTORE_STORES, ACTSTORE_RUNS": "folders of stores and runs, where no `--stores` or `--runs` is given",
    "ACTSTORE_CACHE": "folder for chunks of stores in buckets; default ~/.cache/actstore",
    "HF_HOME, HF_HUB_OFFLINE, HF_TOKEN": "the Hugging Face hub's files, 1 to ask nothing of it, and who you are",
    "RANK, WORLD_SIZE, SLURM_*": "which worker of how many this process is, set by torchrun, srun or a shell loop",
    "MASTER_ADDR, MASTER_PORT": "where the processes of one `trainer fit` meet, set by torchrun",
    "AWS_*, GOOGLE_*, AZURE_*": "credentials and endpoints of buckets ([remote.md](remote.md))",
    "OPENAI_API_KEY": "key for `trainer label --endpoint`",
    "OMP_NUM_THREADS": "threads of torch and of the compiled loops; default: all cores",
}


def manual() -> str:
    """Return the whole manual as Markdown."""
    sections = [HEAD]
    for group in (actstore, trainer):
        sections.append(f"## {group.name}\n\n{_prose(group.help)}\n")
        sections += [_section(f"{group.name} {name}", command) for name, command in sorted(group.commands.items())]
    sections.append("## Environment\n\n" + "\n".join(f"- `{n}`: {text}." for n, text in ENVIRONMENT.items()) + "\n")
    sections.append("## Exit status\n\n" + _prose(EXIT_CODES.removeprefix("Exit codes: ")) + "\n")
    return "\n".join(sections)


def _prose(text: str | None) -> str:
    """Return a help text with its paragraphs joined, and its examples as code."""
    parts = []
    for part in inspect.cleandoc(text or "").split("\n\n"):
        code = part.startswith("\b")
        parts.append(f"```\n{part[2:]}\n```" if code else " ".join(part.split()))
    return "\n\n".join(parts)


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [f"### {name}\n", f"```\n{usage}\n```\n", _prose(command.help), ""]
    for option in command.params:
        if record := option.get_help_record(context):
            spelled, said = record
            text, *extra = re.split(r"\s+(?=\[(?:default|required|x))", " ".join(said.split()))
            lines.append(f"- **`{spelled}`** {text}" + "".join(f" *{e.strip('[]')}*" for e in extra))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(manual())
