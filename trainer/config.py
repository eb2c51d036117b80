"""What a run is: the options of a fleet, and the resolved configuration of each of its SAEs.

`FitConfig` is what a person asks for; `SaeConfig` is what decides one SAE's weights, nothing left open. The run digest
is the SHA-256 of (SaeConfig, content digest of the store): the same SAE asked for again, in whatever fleet, is the
same run.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import UsageError
from actstore.files import read_bounded
from actstore.limits import MAX_ROWS, MAX_TOML_BYTES

MAX_LATENTS = 1 << 24
MAX_FLEET = 1024
Precision = Literal["float32", "bfloat16"]  # of the encoder's product; weights and all sums are float32
Normalize = Literal["median", "mean-norm", "dimension", "none"]
Centre = Literal["median", "mean", "zero"]
DeadMethod = Literal["auxk", "resample", "none"]
Option = bool | int | float | str  # a value of an architecture's own option
LATER_DEFAULTS = (  # fields younger than the first runs: left out of a run's digest at their default
    ("precision", "float32"), ("normalize", "median"), ("centre", "median"), ("dead", "auxk"), ("skip", False), ("options", ()),
    ("imported", ""),
)  # fmt: skip
_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
ALLOWED: dict[str, tuple[float, float]] = {  # the least and the most that a field, or each value of a list, may be
    **dict.fromkeys(("n_latents", "k", "batch_size"), (1, MAX_LATENTS)),
    **dict.fromkeys(("rows", "aux_k", "dead_after_rows"), (1, MAX_ROWS)),
    **dict.fromkeys(("seed", "shuffle_seed"), (0, (1 << 63) - 1)),
    **dict.fromkeys(("holdout", "warmup_fraction", "decay_fraction"), (0, 1)),
    **dict.fromkeys(("lr", "epochs"), (1e-300, 1e300)),
    "skip_positions": (0, MAX_ROWS),
    "aux_alpha": (0, 1e300),
}


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Recipe:
    """What the SAEs of a fleet have in common.

    `batch_size` is the rows of a step. `holdout` is the fraction of documents whose rows are never trained on.
    `shuffle_seed` fixes the order of rows and is apart from the seed of the initial weights, so that SAEs of several seeds
    share every batch of a fleet. `precision` is that of the encoder's product; "float32" selects and values latents as
    float32 does, whatever the product runs in. `skip` adds a linear map from what a transcoder reads to what it
    reconstructs.

    Raises: UsageError: a value that ALLOWED does not allow, or a warm-up and a decay that overlap.
    """

    batch_size: int = 4096
    holdout: float = 0.02
    skip_positions: int = 0
    exclude_special: bool = False
    shuffle: Literal["window", "exact", "chunks"] = "window"
    shuffle_seed: int = 0
    aux_alpha: float = 1 / 32
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    precision: Precision = "float32"
    normalize: Normalize = "median"
    centre: Centre = "median"
    dead: DeadMethod = "auxk"
    skip: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in ALLOWED.items():
            value = getattr(self, name, None)
            for each in value if isinstance(value, tuple) else (value,):
                _require(each is None or least <= each <= most, name, each, f"{least} to {most}")
        _require(self.holdout < 1, "holdout", self.holdout, "a fraction from 0 up to 1, 1 excluded")
        both = self.warmup_fraction + self.decay_fraction
        _require(both <= 1, "warmup_fraction", self.warmup_fraction, "1 with decay_fraction")


@dataclass(frozen=True, slots=True, config=_STRICT)
class SaeConfig(Recipe):
    """One SAE: everything that decides its weights, but the store's rows.

    `rows` is the number of rows to train on in all (epochs are resolved into it). `k` is the number of active latents a
    row: exactly, in the mean of a batch, or what a penalty is steered to. `options` are those of the architecture that are
    not at their default, sorted by name. `imported` names the format and the digest of the files that an SAE was read
    from: they alone decided its weights, and what else is said of its training here says nothing.
    """

    arch: str
    n_latents: int
    k: int
    lr: float
    seed: int
    rows: int
    aux_k: int
    dead_after_rows: int
    options: tuple[tuple[str, Option], ...] = ()
    imported: Annotated[str, Field(pattern=r"^([a-z_]+:[0-9a-f]{64})?$")] = ""
    format: Literal[1] = 1

    @property
    def steps(self) -> int:
        """Steps in all; the last may have fewer rows."""
        return -(-self.rows // self.batch_size)


@dataclass(frozen=True, slots=True, config=_STRICT)
class FitConfig(Recipe):
    """A fleet: every combination of arch, n_latents, k, lr and seed, trained from the same batches.

    Each field is an option of `trainer fit`. `lr` None is the recipe's rule (`recipe_lr`); `aux_k` None is half of
    d_model; `dead_after_rows` None is a tenth of the rows, at most 10 million (Gao et al. 2024, section 2.4). `option`
    holds options of architectures by name; each SAE takes those its architecture has.

    Raises: UsageError: as `Recipe`; a list without values, or more active latents than there are.
    """

    arch: tuple[str, ...] = ("topk",)
    n_latents: tuple[int, ...] = (2048,)
    k: tuple[int, ...] = (32,)
    lr: tuple[float, ...] | None = None
    seed: tuple[int, ...] = (42,)
    epochs: float = 1.0
    rows: int | None = None
    aux_k: int | None = None
    dead_after_rows: int | None = None
    option: dict[str, Option] = Field(default_factory=dict)

    @field_validator("arch", "n_latents", "k", "lr", "seed", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        """Let a single value stand for a list of one."""
        return value if value is None or isinstance(value, list | tuple) else (value,)

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for name in ("arch", "n_latents", "k", "seed"):
            _require(len(getattr(self, name)) > 0, name, getattr(self, name), "at least one value")
        _require(max(self.k) <= min(self.n_latents), "k", max(self.k), f"at most n_latents, {min(self.n_latents)}")


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise UsageError(f"{name} is {value}; allowed: {allowed}", do=f"change --{name.replace('_', '-')}")


def recipe_lr(n_latents: int, steps: int) -> float:
    """Return the default learning rate of Adam for a dictionary of n_latents that is trained for some steps.

    Source: 2e-4 / sqrt(n / 2**14), fitted to the optima of Gao et al. 2024 (arXiv 2406.04093), appendix A.3, as used by
    dictionary_learning and sparsify. Ours: these are optima of long fits. A fit of fewer than 8,000 steps takes
    (8,000 / steps)^0.4 times as much, at most 4 times (docs/quality.md).

    Example:
        >>> recipe_lr(16384, 10_000), recipe_lr(4096, 10_000), round(recipe_lr(16384, 500), 6)
        (0.0002, 0.0004, 0.000606)
    """
    return 2e-4 / math.sqrt(n_latents / 2**14) * min(4.0, max(1.0, math.pow(8000 / steps, 0.4)))


def resolve(
    config: FitConfig, d_model: int, train_rows: int, options: Mapping[str, tuple[tuple[str, Option], ...]] | None = None
) -> list[SaeConfig]:
    """Return the configuration of each SAE of a fleet, in the order of the comma lists.

    Args:
        config: what was asked for.
        d_model: width of the store's rows.
        train_rows: rows of the store that may be trained on.
        options: of each architecture, those not at their default; see `architectures.chosen_options`.

    Raises: UsageError: no rows to train on, or more than MAX_FLEET combinations.

    Example:
        >>> [(c.n_latents, c.k, c.rows) for c in resolve(FitConfig(k=(16, 32), epochs=2), d_model=64, train_rows=1000)]
        [(2048, 16, 2000), (2048, 32, 2000)]
    """
    if train_rows < 1:
        raise UsageError("no rows are left to train on", do="lower --holdout or --skip-positions")
    wanted = config.rows or max(1.0, train_rows * config.epochs)
    _require(wanted <= MAX_ROWS, "epochs", config.epochs, f"at most {MAX_ROWS} rows in all")
    rows = round(wanted)
    shared = {f.name: getattr(config, f.name) for f in fields(Recipe)}
    dead_after = config.dead_after_rows or min(10_000_000, max(rows // 10, 8 * config.batch_size))
    fleet = [
        SaeConfig(
            arch=arch, n_latents=n, k=k, lr=lr or recipe_lr(n, -(-rows // config.batch_size)), seed=seed, rows=rows,
            aux_k=min(config.aux_k or max(1, d_model // 2), n), dead_after_rows=dead_after,
            options=(options or {}).get(arch, ()), **shared,
        )
        for arch, n, k, lr, seed in product(config.arch, config.n_latents, config.k, config.lr or (None,), config.seed)
    ]  # fmt: skip
    if len(fleet) > MAX_FLEET:
        raise UsageError(f"the fleet has {len(fleet)} SAEs, at most {MAX_FLEET} are allowed", do="shorten the comma lists")
    return fleet


def config_json(config: SaeConfig) -> dict[str, Any]:
    """Return a configuration as JSON values.

    Example:
        >>> (config,) = resolve(FitConfig(), d_model=64, train_rows=1000)
        >>> config_json(config)["k"], "skip" in config_json(config)
        (32, False)
    """
    found = {f.name: getattr(config, f.name) for f in fields(SaeConfig)}
    return {name: value for name, value in found.items() if (name, value) not in LATER_DEFAULTS}


def run_digest(config: SaeConfig, content_digest: str) -> str:
    """Return the run digest: SHA-256 of the configuration and the content digest of the store."""
    return sha256_bytes(canonical_json({"config": config_json(config), "content": content_digest}))


def parse_config(value: Any, kind: type[Any], what: str) -> Any:
    """Return `kind` made of parsed JSON or TOML values. Raises: UsageError: an unknown field or a wrong value.

    Example:
        >>> parse_config({"k": [16, 32], "n_latents": 4096}, FitConfig, "fleet.toml").k
        (16, 32)
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{what}: {field or 'all'}: {first['msg']}", where=what, do="see `trainer fit --help`") from error


def load_config(path: Path) -> dict[str, Any]:
    """Return the fields of a TOML file for FitConfig.

    Raises: UsageError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(read_bounded(path.parent.resolve(), path.name, MAX_TOML_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        raise UsageError("the config file does not exist", str(path)) from error
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise UsageError(f"not a TOML file: {str(error)[:200]}", str(path)) from error
