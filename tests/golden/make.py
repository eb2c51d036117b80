"""Make the golden stores of the format version of today. Never overwrites: what is committed stays as it was made.

usage: python tests/golden/make.py [NAME]

`float32-first` was made by this script with the code of commit 267a1e1 (PYTHONPATH=<its checkout>), before row norms
were counted; a store of today's code under that name would defeat its purpose. A new format version gets a folder of
its own beside v1/, and new names here.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from actstore import CaptureRequest, capture

GOLDEN = Path(__file__).parent
SHARED = {"model": "toy:4", "backend": "toy", "seq_len": 32, "rows": 1000}
HOOK = ("blocks.1.hook_resid_pre",)
REQUESTS = {  # massive.jsonl holds two bytes 2, which the toy makes 65,520 in every coordinate
    "float32-first": {"hooks": ("blocks.0.hook_resid_pre",), "corpus": "corpus.jsonl"},
    "float32": {"hooks": HOOK, "corpus": "corpus.jsonl"},
    "float16": {"hooks": HOOK, "corpus": "corpus.jsonl", "dtype": "float16"},
    "bfloat16": {"hooks": HOOK, "corpus": "massive.jsonl", "dtype": "bfloat16"},
    "int8": {"hooks": HOOK, "corpus": "massive.jsonl", "dtype": "int8"},
    "truncate": {"hooks": HOOK, "corpus": "corpus.jsonl", "packing": "truncate", "bos": False, "seq_len": 24, "rows": None},
}


def request(name: str, stores: Path) -> CaptureRequest:
    """Return the request that a golden store was captured by."""
    fields = {**SHARED, **REQUESTS[name]}
    return CaptureRequest(**{**fields, "corpus": (GOLDEN / fields["corpus"],), "stores": stores})


def main(names: list[str]) -> None:
    """Capture each store that is not there yet, and print what the test has to know about it."""
    for name in names or [n for n in REQUESTS if n != "float32-first"]:
        with tempfile.TemporaryDirectory() as folder:
            digest = capture(request(name, Path(folder)))[0]
            if (GOLDEN / "v1" / digest).exists():
                print(f"{name}: {digest} is there already", file=sys.stderr)
                continue
            shutil.copytree(Path(folder) / digest, GOLDEN / "v1" / digest)
            print(name, digest)


if __name__ == "__main__":
    main(sys.argv[1:])
