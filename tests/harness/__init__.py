"""The crash and fault harness: plain functions that pytest (CI sizes) and `make torture` (long form) both call."""

import os

# Before numpy is imported: its threads would be stopped and started around every fork, which costs more than the fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
