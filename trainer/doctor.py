"""What a machine is good for in training: processor, memory, CUDA, compiled loops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from actstore.doctor import Check, warn_if
from actstore.plan import available_memory
from trainer.kernels import compiled
from trainer.kernels.cpu import has_bfloat16


def check_devices() -> Iterator[Check]:
    """Yield the processor and its instructions, threads, memory, CUDA devices, and the cache of compiled loops."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    products = "bfloat16 products (avx512_bf16 or AMX)" if has_bfloat16() else "no bfloat16 products: float32 ones are used"
    yield Check("cpu", "ok", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}, {products}")
    threads, memory = torch.get_num_threads(), available_memory()
    yield warn_if(threads > cores, "threads", str(threads), f"set OMP_NUM_THREADS={cores}")
    yield Check("memory", "ok", "not known" if memory is None else f"{memory / 1e9:.1f} GB available")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Check(f"cuda:{i}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB, {about.major}.{about.minor}")
    if not torch.cuda.is_available():
        idle = Path("/proc/driver/nvidia").exists()  # a driver, but a torch without CUDA
        do = "install a torch built for it: https://pytorch.org/get-started/locally"
        yield warn_if(idle, "cuda", f"none for torch {torch.__version__}{', but there is a driver' if idle else ''}", do)
    folder, files = compiled.cache()
    said = f"{files} compiled loops in {folder}" if files else "empty: the first fit compiles for a minute or two"
    yield warn_if(not compiled.CACHED, "kernel cache", said, "make the home folder writable, or set NUMBA_CACHE_DIR")
