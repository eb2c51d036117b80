"""The registered Zarr v3 extension type `bfloat16` for zarr-python, which has none of its own (zarr issue #2656).

`import actstore.bfloat16` registers it, and plain `zarr.open_group` then reads bfloat16 stores; tensorstore and zarrs
read the same files natively. There is an entry point of the group `zarr.data_type` too, but zarr 3.1.6 collects these
and never loads them. In numpy the type is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.wrapper import ZDType

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": -float("inf")}


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """zarr's description of the bfloat16 data type; zarr calls these methods, nothing else does."""

    dtype_cls: ClassVar[type[Any]] = type(BFLOAT16)
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Accept the numpy dtype `ml_dtypes.bfloat16` only."""
        if dtype == BFLOAT16:
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return bool(dtype == BFLOAT16)

    def to_native_dtype(self) -> Any:
        """Return the numpy dtype."""
        return BFLOAT16

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 exists in Zarr v3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not bfloat16")

    def to_json(self, zarr_format: Any) -> Any:
        """Return the name under which `zarr.json` lists the type."""
        if zarr_format != 3:
            raise ValueError("bfloat16 exists in Zarr v3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> Any:
        return isinstance(data, int | float | np.floating | np.integer | ml_dtypes.bfloat16)

    def cast_scalar(self, data: Any) -> Any:
        """Round a number to bfloat16."""
        return ml_dtypes.bfloat16(data)

    def default_scalar(self) -> Any:
        """Return zero, zarr's default fill value; our arrays set NaN."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """Read a fill value: a number, "NaN", "Infinity", "-Infinity" or the bits as "0x…"."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16)).view(BFLOAT16)
        return ml_dtypes.bfloat16(_SPECIAL.get(data, data) if isinstance(data, str) else data)

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> Any:
        """Spell a fill value."""
        value = float(data)  # type: ignore[arg-type]
        return next((name for name, special in _SPECIAL.items() if repr(special) == repr(value)), value)

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return BFLOAT16.itemsize


data_type_registry.register("bfloat16", BFloat16)
