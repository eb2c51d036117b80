"""The crash and fault harness: plain functions that pytest (CI sizes) and `make torture` (long form) both call."""
