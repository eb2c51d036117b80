"""What is asked for and what it is derived from: a capture's options, and the store key of each hook point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from actstore.backends import Backend
from actstore.digests import sha256_bytes
from actstore.errors import UsageError
from actstore.key import HubCorpus, LocalCorpus, Packing, SequenceRule, StoreKey
from actstore.limits import MAX_SEQ_LEN, MAX_TEMPLATE_BYTES, MAX_WORKERS, MIN_SEQ_LEN
from actstore.reference_rows import STUDY_TOKENS


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What to capture. Each field is an option of `actstore capture`; see its help for the meaning and units."""

    model: str
    hooks: tuple[str, ...]
    corpus: tuple[Path, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    text_field: str = "text"
    token_field: str | None = None
    chat_template: str | None = None
    bad_lines: Literal["error", "skip"] = "error"
    max_documents: int | None = None
    seq_len: int = 128
    packing: Packing = "pack"
    pad_together: int | None = None
    bos: bool | None = None
    rows: int | None = None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    center: bool = False
    revision: str | None = None
    backend: str = "auto"
    device: str = "auto"
    batch_tokens: int | None = None
    stores: Path | str | None = None
    workers: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if not self.hooks or len(set(self.hooks)) != len(self.hooks):
            raise UsageError("hook points must be named once each", ", ".join(self.hooks), "--hook blocks.12.hook_resid_pre")
        if bool(self.corpus) == bool(self.dataset):
            raise UsageError("exactly one of --corpus and --dataset must be given", do="--corpus FILE.jsonl")
        if self.token_field is not None and self.chat_template is not None:
            raise UsageError("--token-field takes token ids, --chat-template makes text", do="leave one of them out")
        if not MIN_SEQ_LEN <= self.seq_len <= MAX_SEQ_LEN:
            raise UsageError(f"--seq-len {self.seq_len} is outside {MIN_SEQ_LEN} to {MAX_SEQ_LEN} tokens")
        if self.pad_together is not None and self.packing != "reference":
            raise UsageError("--pad-together pads documents, which only --packing reference does", do="leave it out")
        for option in ("rows", "max_documents", "batch_tokens", "pad_together"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"--{option.replace('_', '-')} {value} must be at least 1")
        if not 1 <= self.workers <= MAX_WORKERS or not 0 <= self.rank < self.workers:
            raise UsageError(
                f"--rank {self.rank} of --workers {self.workers}: ranks count from 0, and there are 1 to {MAX_WORKERS} workers",
                do="worker i of N runs with --workers N --rank i, or with WORLD_SIZE=N RANK=i in its environment",
            )


def worker_of(environment: Mapping[str, str]) -> tuple[int, int, str]:
    """Return what a launcher says in a process's environment: workers, rank of this one, and the variable that gave it.

    RANK and WORLD_SIZE (torchrun, a shell loop) come first. Without them, SLURM_PROCID is the task of an srun, and
    SLURM_ARRAY_TASK_ID the element of an array; both together count tasks of all elements. The rank only decides where
    a worker begins, so an array with gaps does no harm. (1, 0, "") when nothing is said.

    Raises: UsageError: a variable is no number.
    Source: man srun, "OUTPUT ENVIRONMENT VARIABLES"; man sbatch, likewise.

    Example:
        >>> worker_of({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"})
        (3, 1, 'SLURM_ARRAY_TASK_ID')
    """

    def number(*names: str, default: int = 1) -> int:
        name = next((n for n in names if environment.get(n)), None)
        try:
            return default if name is None else int(environment[name])
        except ValueError as error:
            raise UsageError(f"{name} is {environment[str(name)]!r}, not a number", "the environment of this process") from error

    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        return number("WORLD_SIZE"), number("RANK", default=0), "RANK"
    tasks, task = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), number("SLURM_PROCID", default=0)
    first, step = number("SLURM_ARRAY_TASK_MIN", default=0), number("SLURM_ARRAY_TASK_STEP")
    elements, element = number("SLURM_ARRAY_TASK_COUNT"), (number("SLURM_ARRAY_TASK_ID", default=first) - first) // max(1, step)
    used = [("SLURM_ARRAY_TASK_ID", elements > 1), ("SLURM_PROCID", tasks > 1 and "SLURM_PROCID" in environment)]
    named = " and ".join(name for name, many in used if many)
    workers = max(1, elements) * max(1, tasks)
    return (workers, (element * tasks + task) % workers, named) if named else (1, 0, "")


def chat_template(request: CaptureRequest, backend: Backend) -> str:
    """Return the chat template asked for: the tokenizer's own, or a file's. Raises: UsageError."""
    assert request.chat_template is not None
    if request.chat_template == "default":
        return backend.chat_template()
    path = Path(request.chat_template)
    try:
        data = path.read_bytes()
        if len(data) > MAX_TEMPLATE_BYTES:
            raise UsageError(f"the chat template has {len(data)} bytes, at most {MAX_TEMPLATE_BYTES} are allowed", str(path))
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the chat template cannot be read: {error}", str(path), "give --chat-template default, or a UTF-8 file"
        ) from error


def make_keys(request: CaptureRequest, backend: Backend, corpus: LocalCorpus | HubCorpus) -> list[StoreKey]:
    """Return the store key of each hook point.

    Raises: UsageError: BOS asked for and the tokenizer has none; sequences longer than the model's context; a value
        that no key can hold.
    """
    # What was tokenized elsewhere has its special tokens already.
    default = backend.bos is not None and request.token_field is None
    bos = default if request.bos is None else request.bos
    if bos and backend.bos is None:
        raise UsageError("--bos was given, but the tokenizer has no BOS token", do="pass --no-bos")
    padded = request.packing == "reference"
    if padded and backend.pad is None:
        raise UsageError("--packing reference pads documents, but the tokenizer has no padding and no EOS token")
    beside = int(padded and bos)  # BOS comes on top of seq_len there
    if backend.context is not None and request.seq_len + beside > backend.context:
        raise UsageError(
            f"--seq-len {request.seq_len} is longer than the model's context of {backend.context} tokens",
            do=f"--seq-len {backend.context - beside} or less",
        )
    together = request.pad_together or max(1, STUDY_TOKENS // request.seq_len) if padded else None
    dtype = backend.compute_dtype if request.dtype == "auto" else request.dtype
    shared = {
        "backend": backend.name,
        "attention": backend.attention,
        "model": backend.fingerprint(),
        "compute_dtype": backend.compute_dtype,
        "center": request.center,
        "corpus": corpus,
        "text_field": request.token_field or request.text_field,
        "content": "tokens" if request.token_field else "chat" if request.chat_template else "text",
        "chat_template": sha256_bytes(chat_template(request, backend).encode()) if request.chat_template else None,
        "bad_lines": request.bad_lines,
        "max_documents": request.max_documents,
        "tokenizer": backend.tokenizer_digest(),
        "sequences": SequenceRule(packing=request.packing, seq_len=request.seq_len, bos=bos, pad_together=together),
        "dtype": dtype,
        "rows": request.rows or "all",
    }
    try:
        return [StoreKey.model_validate({**shared, "hook": hook}) for hook in request.hooks]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", do="see `actstore capture --help`") from error
