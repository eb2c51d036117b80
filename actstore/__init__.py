"""actstore: capture a language model's activations once, keep them safely, read them memory-mapped.

The public surface. `open_store` reads a store, `Cache` one in a bucket, `capture` makes one; errors derive from `ActstoreError`.
"""

from actstore.cache import Cache
from actstore.capture import CaptureRequest, capture
from actstore.catalog import list_stores, open_store, remove_store
from actstore.check import check_store
from actstore.errors import ActstoreError
from actstore.reader import Store

__all__ = [
    "ActstoreError",
    "Cache",
    "CaptureRequest",
    "Store",
    "capture",
    "check_store",
    "list_stores",
    "open_store",
    "remove_store",
]
