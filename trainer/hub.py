"""A finished SAE on the Hugging Face hub: its files in a format, our own run beside them, and a model card.

The repository gets one folder a run, `<run digest, 12 digits>/`, so several runs share one. Credentials are those of
`hf auth login` or $HF_TOKEN; they are never an argument. `--dry-run` needs no network.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from actstore import durable
from actstore.errors import StorageFailed, UsageError
from trainer.checkpoint import Run
from trainer.config import config_json
from trainer.formats import export_run
from trainer.sources import Sources

URL = re.compile(r"hf://([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})")


def push_run(
    run: Run, url: str, name: str, open_sources: Callable[[], Sources], *, private: bool = False, dry_run: bool = False
) -> tuple[list[tuple[str, int]], str]:
    """Upload a finished run in a format, beside it our own files, with a model card.

    Args:
        run: the run.
        url: "hf://user/repo"; the repository is made when it does not exist.
        name: of the format; "actstore" for ours alone.
        open_sources: opens the run's stores.
        private: make a new repository private.
        dry_run: write the files to a temporary folder, and upload nothing.

    Returns: path in the repository and size in bytes of each file, and the model card.
    Raises: UsageError: no such URL, or the format cannot hold this SAE. StorageFailed: the hub refused it.
    """
    matched = URL.fullmatch(url)
    if matched is None:
        raise UsageError(f"{url[:120]!r} is no repository of the hub", do="write it as hf://user/repo")
    repo, folder = matched[1], run.digest[:12]
    card = model_card(run, repo, name)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / folder
        if name != "actstore":
            export_run(run, name, out, open_sources)
        export_run(run, "actstore", out / "actstore")
        durable.write_new(out, "README.md", [card.encode()])
        durable.remove_tree(out / "tmp")
        paths = sorted(path for path in out.rglob("*") if path.is_file())
        files = [(path.relative_to(temporary).as_posix(), path.stat().st_size) for path in paths]
        if not dry_run:
            _upload(Path(temporary), repo, f"actstore run {folder}", card, private)
    return files, card


def _upload(root: Path, repo: str, message: str, card: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=private or None)
        if not api.file_exists(repo, "README.md"):  # the card of the first run is that of the repository
            durable.write_new(root, "README.md", [card.encode()])
            durable.remove_tree(root / "tmp")
        api.upload_folder(repo_id=repo, folder_path=root, commit_message=message)
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes
        raise StorageFailed(
            f"the hub refused the upload: {str(error)[:300]}", f"hf://{repo}", "`hf auth login`, then run this again"
        ) from error


def model_card(run: Run, repo: str, name: str) -> str:
    """Return the card of a run: what it is, its numbers, where it comes from, how to load it; Markdown with YAML in front."""
    loader = PackageLoader("trainer", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "code": _code,
        "json": lambda value: json.dumps(value, sort_keys=True, indent=None if isinstance(value, list | str) else 1),
    }
    values = {"run": run, "repo": repo, "name": name, "folder": run.digest[:12], "held": run.held_out}
    card = environment.get_template("card.md.j2")
    return card.render(**values, config=config_json(run.config), model=run.key["model"], corpus=run.key["corpus"])


def _code(value: object) -> str:
    """Return text from a run's files, which may be a stranger's, as Markdown code that it cannot leave."""
    return f"`{' '.join(str(value)[:200].replace('`', chr(39)).split())}`"
