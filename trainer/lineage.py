"""The commands that make a run again, from its store's key and its configuration."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from trainer.checkpoint import Run
from trainer.config import FitConfig

MODEL, CORPUS = "MODEL_FOLDER", "CORPUS_FILE"  # stand for local paths, which no run knows; their digests are in the key
OF_FIT = ("arch", "n_latents", "k", "lr", "seed", "rows")  # always said
NOT_OPTIONS = ("options", "imported", "format", "warmup_fraction", "decay_fraction", "skip", "exclude_special")


def commands(run: Run) -> list[str]:
    """Return the shell commands that capture a run's first store and train it; the second is left out for an imported SAE.

    Example:
        >>> commands(find_run("3fa9"))[1]                       # doctest: +SKIP
        'trainer fit --store 9b2e41… --arch topk --n-latents 2048 --k 32 --lr 0.002 --seed 42 --rows 666688'
    """
    return [_capture(run.key)] + ([] if run.config.imported else [_fit(run)])


def _capture(key: dict[str, Any]) -> str:
    corpus, sequences, model = key["corpus"], key["sequences"], key["model"]
    local = corpus["source"] == "local"
    options = {
        "model": model.get("name") or MODEL, "revision": model.get("revision"), "hook": key["hook"],
        "corpus": CORPUS if local else None, "dataset": corpus.get("dataset"), "dataset-config": corpus.get("config"),
        "split": corpus.get("split"), "dataset-revision": corpus.get("revision"),
        "token-field" if key.get("content") == "tokens" else "text-field": key["text_field"],
        "chat-template": "TEMPLATE_FILE" if key.get("chat_template") else None,
        "bad-lines": key["bad_lines"], "max-documents": key["max_documents"], "seq-len": sequences["seq_len"],
        "packing": sequences["packing"], "rows": None if key["rows"] == "all" else key["rows"], "dtype": key["dtype"],
        "compute-dtype": key["compute_dtype"], "backend": key["backend"],
    }  # fmt: skip
    flags = ["--bos" if sequences["bos"] else "--no-bos", *(["--center"] if key["center"] else [])]
    return shlex.join(["actstore", "capture", *_words(options), *flags])


def _fit(run: Run) -> str:
    config, defaults = run.config, {f.name: f.default for f in fields(FitConfig)}
    options = {"store": run.store[:12], "target-store": next((o.store[:12] for o in run.others if o.role == "target"), None)}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in OF_FIT or (field.name not in NOT_OPTIONS and value != defaults.get(field.name)):
            options[field.name.replace("_", "-")] = value
    flags = [f"--{name.replace('_', '-')}" for name in ("skip", "exclude_special") if getattr(config, name)]
    inputs = [word for o in run.others if o.role == "input" for word in ("--store", o.store[:12])]
    named = [word for name, value in config.options for word in ("--option", f"{name}={value}")]
    return shlex.join(["trainer", "fit", *_words(options), *inputs, *flags, *named])


def _words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
