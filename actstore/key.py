"""What a store is derived from. The store digest is the SHA-256 of the key's canonical JSON.

Whatever can change the activations beyond float rounding is in here; batch size, device, threads, paths, host and
time are not (they go to the manifest's provenance, which decides nothing).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actstore.digests import canonical_json, parse_json, sha256_bytes
from actstore.errors import FormatError
from actstore.limits import MAX_CORPUS_FILES, MAX_KEY_BYTES, MAX_ROWS, MAX_SEQ_LEN, MIN_SEQ_LEN

FORMAT_VERSION = 1
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=4096)]
StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]
ComputeDtype = Literal["float32", "float16", "bfloat16"]
Packing = Literal["pack", "truncate", "reference"]
FileFormat = Literal["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "txt", "parquet", "csv", "tsv", "arrow"]
ContentKind = Literal["text", "tokens", "chat"]
BackendName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]  # a file in actstore/backends
Attention = Literal["sdpa", "eager", "none"]


class Strict(BaseModel):
    """A frozen record that accepts exactly its own fields with exactly their types, in Python and from JSON."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


Record = TypeVar("Record", bound=Strict)


def parse_record(kind: type[Record], data: bytes, what: str) -> Record:
    """Parse one of our JSON files into its record.

    Args:
        kind: the record's class.
        data: the file's bytes, already bounded.
        what: the file's name, for the message.

    Raises: FormatError: not strict JSON, an unknown version, or a field missing, unknown or out of range.

    Example:
        >>> parse_record(SequenceRule, b'{"packing": "pack", "seq_len": 8, "bos": true}', "a rule").seq_len
        8
    """
    value = parse_json(data, what)
    declared = kind.model_fields.get("format")
    known = (declared and get_args(declared.annotation)) or (FORMAT_VERSION,)
    if isinstance(value, dict) and not any(value.get("format", FORMAT_VERSION) == version for version in known):
        raise FormatError(
            f"{what} has format version {value['format']!r}, this program reads version {' or '.join(map(str, known))}",
            where=what,
            do="use the version of actstore that wrote it",
        )
    try:
        # Validated from Python objects, not from text: pydantic's own JSON parser takes repeated keys and NaN.
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{what}: field {field or '(all)'}: {first['msg']}", where=what) from error


class ModelIdentity(Strict):
    """Which weights: a hub id with its resolved commit, or the digest of a local folder's weight and config files."""

    source: Literal["hub", "local", "toy"]
    name: Name | None = None
    revision: Name | None = None
    digest: Digest | None = None


class CorpusFile(Strict):
    """How one local corpus file is read, and its size: with the digest of all bytes this fixes every file's bytes."""

    format: FileFormat
    bytes: int = Field(ge=0)


class LocalCorpus(Strict):
    """Local files in order. `digest` is the SHA-256 of their raw bytes, one after another."""

    source: Literal["local"] = "local"
    digest: Digest
    files: list[CorpusFile] = Field(min_length=1, max_length=MAX_CORPUS_FILES, fail_fast=True)


class HubCorpus(Strict):
    """A hub dataset at a resolved commit."""

    source: Literal["hub"] = "hub"
    dataset: Name
    config: Name | None = None
    split: Name
    revision: Name


class SequenceRule(Strict):
    """How documents become sequences.

    `pack` joins documents into full sequences; `truncate` keeps the first `seq_len` tokens of each document; `reference`
    is `reference_rows`, which pads `pad_together` documents to the longest of them.
    `bos`: every sequence starts with the tokenizer's BOS token, which counts towards `seq_len` (not with `reference`).
    """

    packing: Packing
    seq_len: int = Field(ge=MIN_SEQ_LEN, le=MAX_SEQ_LEN)
    bos: bool
    pad_together: int | None = Field(default=None, ge=1, le=MAX_ROWS, exclude_if=lambda value: value is None)

    def model_post_init(self, context: Any) -> None:
        """Refuse padding with another packing, and none with this one."""
        if (self.packing == "reference") != (self.pad_together is not None):
            raise ValueError("pad_together belongs to packing reference, and to no other")


class StoreKey(Strict):
    """Everything a store is derived from; see the module's first lines for what is left out and why.

    A field that is younger than the first stores is not written at its default (`exclude_if`): digests stay what they are.
    """

    format: Literal[1] = 1
    backend: BackendName
    attention: Attention
    model: ModelIdentity
    compute_dtype: ComputeDtype
    weight_processing: Literal["none"] = "none"
    center: bool = False
    hook: Name
    corpus: LocalCorpus | HubCorpus = Field(discriminator="source")
    text_field: Name
    content: ContentKind = Field(default="text", exclude_if=lambda value: value == "text")
    chat_template: Digest | None = Field(default=None, exclude_if=lambda value: value is None)
    bad_lines: Literal["error", "skip"]
    max_documents: int | None = Field(default=None, ge=1, le=MAX_ROWS)
    tokenizer: Digest
    sequences: SequenceRule
    dtype: StoredDtype
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)] | Literal["all"] = "all"

    def same_but_rows(self, other: StoreKey) -> bool:
        """Return whether both keys are derived from the same but for the number of rows: their rows are then the same."""
        return self.model_copy(update={"rows": other.rows}) == other


def dump_key(key: StoreKey) -> bytes:
    """Return the key's canonical JSON, the bytes of `key.json`."""
    return canonical_json(key.model_dump())


def store_digest(key: StoreKey) -> str:
    """Return the store digest: SHA-256 of the key's canonical JSON, 64 hexadecimal digits. It names the folder."""
    return sha256_bytes(dump_key(key))


def parse_key(data: bytes) -> StoreKey:
    """Parse `key.json`. Raises: FormatError: over MAX_KEY_BYTES, or not a key of this version."""
    if len(data) > MAX_KEY_BYTES:
        raise FormatError(f"key.json has {len(data)} bytes, at most {MAX_KEY_BYTES} are allowed", where="key.json")
    return parse_record(StoreKey, data, "key.json")
