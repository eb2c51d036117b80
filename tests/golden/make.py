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

from actstore import CaptureRequest, capture, manifest
from actstore.limits import MAX_LISTED_GROUPS

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

TABLED = "float32"  # of format version 2: its row group's digest lies in row_groups.bin; equal to v1's in all else


def request(name: str, stores: Path) -> CaptureRequest:
    """Return the request that a golden store was captured by."""
    fields = {**SHARED, **REQUESTS[name]}
    return CaptureRequest(**{**fields, "corpus": (GOLDEN / fields["corpus"],), "stores": stores})


def main(names: list[str]) -> None:
    """Capture each store that is not there yet, and print what the test has to know about it."""
    wanted = [("v1", name) for name in names or REQUESTS if name != "float32-first"]
    for version, name in [*wanted, ("v2", TABLED)]:
        with tempfile.TemporaryDirectory() as folder:
            # A real store of format 2 has more than MAX_LISTED_GROUPS row groups: gigabytes.
            manifest.MAX_LISTED_GROUPS = 0 if version == "v2" else MAX_LISTED_GROUPS
            digest = capture(request(name, Path(folder)))[0]
            if (GOLDEN / version / digest).exists():
                print(f"{name}: {digest} is there already", file=sys.stderr)
                continue
            shutil.copytree(Path(folder) / digest, GOLDEN / version / digest)
            print(version, name, digest)


if __name__ == "__main__":
    main(sys.argv[1:])
