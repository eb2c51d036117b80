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
from typing import Any, NamedTuple

from actstore import durable
from actstore.errors import StorageFailed, UsageError
from trainer.checkpoint import Run
from trainer.config import config_json
from trainer.formats import export_run
from trainer.sources import Sources

URL = re.compile(r"hf://([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})")
METRICS = {
    "l0": "L0, mean active latents a row", "fvu": "fraction of variance unexplained", "explained_variance": "explained variance",
    "explained_variance_no_special": "explained variance without special tokens and position 0",
    "mse_per_token": "squared error a token", "inactive_fraction": "share of latents active on none of these rows",
    "rows": "rows measured",
}  # fmt: skip
LOADING = {
    "saelens": """from huggingface_hub import snapshot_download
from sae_lens import SAE

sae = SAE.load_from_disk(snapshot_download("{repo}") + "/{folder}")""",
    "dictionary_learning": """from dictionary_learning.utils import load_dictionary
from huggingface_hub import snapshot_download

sae, config = load_dictionary(snapshot_download("{repo}") + "/{folder}", device="cpu")""",
    "sparsify": """from sparsify import SparseCoder

sae = SparseCoder.load_from_hub("{repo}", hookpoint="{folder}")""",
}
OURS = """import trainer
from huggingface_hub import snapshot_download

sae = trainer.load_sae("{digest}", runs=snapshot_download("{repo}") + "/{folder}/actstore")"""


class Pushed(NamedTuple):
    """What was, or would be, uploaded.

    Args:
        repo: "user/repo".
        files: path in the repository and size in bytes.
        card: the model card.
    """

    repo: str
    files: list[tuple[str, int]]
    card: str


def push_run(
    run: Run, url: str, name: str, open_sources: Callable[[], Sources], *, private: bool = False, dry_run: bool = False
) -> Pushed:
    """Upload a finished run in a format, beside it our own files, with a model card.

    Args:
        run: the run.
        url: "hf://user/repo"; the repository is made when it does not exist.
        name: of the format; "actstore" for ours alone.
        open_sources: opens the run's stores.
        private: make a new repository private.
        dry_run: write the files to a temporary folder, and upload nothing.

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
    return Pushed(repo, files, card)


def _upload(root: Path, repo: str, message: str, card: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=private or None)
        if not api.file_exists(repo, "README.md"):  # the card of the first run is that of the repository
            durable.write_new(root, "README.md", [card.encode()])
            durable.remove_tree(root / "tmp")
        api.upload_folder(repo_id=repo, folder_path=root, commit_message=message)
    except Exception as error:
        raise StorageFailed(
            f"the hub refused the upload: {str(error)[:300]}", f"hf://{repo}", "`hf auth login`, then run this again: it resumes"
        ) from error


def model_card(run: Run, repo: str, name: str) -> str:
    """Return the card of a run: what it is, its numbers, where it comes from, how to load it; Markdown with YAML in front."""
    held, c = (run.result or {}).get("held_out") or {}, run.config
    model = str(run.key.get("model", {}).get("name") or run.model)
    front: dict[str, Any] = {
        "library_name": name if name in LOADING else "actstore",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "actstore", c.arch],
    }
    if run.key.get("model", {}).get("source") == "hub":
        front["base_model"] = model
    numbers = [(what, held[key]) for key, what in METRICS.items() if held.get(key) is not None]
    lines = [
        "---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "",  # JSON is YAML
        f"# Sparse autoencoder ({c.arch}, {c.n_latents:,} latents, k {c.k}) of {_code(model)}, {_code(run.key.get('hook'))}", "",
        "## Numbers", "",
        f"Of {'held-out rows (whole documents)' if held else 'no rows: nothing was held out'}. It was trained on "
        f"{(run.result or {}).get('rows_seen', 0):,} rows{' by us; it was imported' if c.imported else ''}.", "",
        "| | |", "|---|---|", *(f"| {what} | {value:.6g} |" for what, value in numbers), "",
        "## Load it", "", *_loading(run, repo, name), "",
        "It encodes activations as the model computes them: nothing is left to normalise.", "",
        "## Lineage", "",
        *(f"- {what}: {_code(value)}" for what, value in _lineage(run)), "",
        "## Configuration", "", "```json", json.dumps(config_json(c), indent=1, sort_keys=True).replace("`", "'"), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _loading(run: Run, repo: str, name: str) -> list[str]:
    values = {"repo": repo, "folder": run.digest[:12], "digest": run.digest}
    found = [text.format(**values) for text in (LOADING.get(name), OURS) if text]
    return [line for text in found for line in ("```python", text, "```", "")]


def _lineage(run: Run) -> list[tuple[str, Any]]:
    model, corpus = run.key.get("model", {}), run.key.get("corpus", {})
    rules = run.key.get("sequences", {})
    return [
        ("run", run.digest), ("store", run.store), ("content digest of its rows", run.content_digest),
        *((f"{other.role} store", other.store) for other in run.others),
        *((("imported from", run.config.imported),) if run.config.imported else ()),
        ("model", model.get("name") or run.model), ("model's revision or digest", model.get("revision") or model.get("digest")),
        ("hook point", run.key.get("hook")), ("corpus", corpus.get("dataset") or corpus.get("digest")),
        ("corpus revision", corpus.get("revision") or "the files' digest above"), ("tokenizer", run.key.get("tokenizer")),
        ("sequences", f"{rules.get('packing')}, {rules.get('seq_len')} tokens, BOS {rules.get('bos')}"),
    ]  # fmt: skip


def _code(value: object) -> str:
    """Return text from a run's files, which may be a stranger's, as Markdown code that it cannot leave."""
    return f"`{' '.join(str(value)[:200].replace('`', chr(39)).split())}`"
