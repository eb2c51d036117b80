"""The registered Zarr v3 extension type `bfloat16` for zarr-python, which has none of its own (zarr issue #2656).

`import actstore.bfloat16` registers it, and plain `zarr.open_group` then reads bfloat16 stores; tensorstore and zarrs
read the same files natively. There is an entry point of the group `zarr.data_type` too, but zarr 3.1.6 collects these
and never loads them. In numpy the type is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """zarr's description of the bfloat16 data type: all that numpy's floats have, but for what is said here."""

    dtype_cls: ClassVar[type[Any]] = type(BFLOAT16)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    def to_json(self, zarr_format: Any) -> Any:
        """Return the name under which `zarr.json` lists the type."""
        if zarr_format != 3:
            raise DataTypeValidationError("bfloat16 exists in Zarr v3 only")
        return self._zarr_v3_name

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """Read a fill value: a number, "NaN", "Infinity", "-Infinity" or the bits as "0x…", which zarr takes for a float16's."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16)).view(BFLOAT16)
        return super().from_json_scalar(data, zarr_format=zarr_format)

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return BFLOAT16.itemsize


data_type_registry.register("bfloat16", BFloat16)
