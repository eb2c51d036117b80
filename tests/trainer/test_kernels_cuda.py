"""The CUDA kernel equals the reference: on a GPU where there is one, else by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton); .ci/run installs it and runs this file")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="runs the others by the interpreter, which a process decides at its start"
)
def test_interpreted():
    """All other tests of this file, in a process where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout[-4000:]


needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: interpreted by test_interpreted"
)


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def both(encode, d_in, d_out, n, batch, dtype=torch.float64):
    """Loss, dense code and gradients by the reference and by the CUDA kernel."""
    from trainer.kernels import cuda, reference
    from trainer.kernels.gradients import recycle

    x, target = made(batch, d_in, seed=1, dtype=dtype), made(batch, d_out, seed=2, dtype=dtype)
    x[0] = 0
    weights = [0.3 * made(*s, seed=3 + i, dtype=dtype) for i, s in enumerate([(n, d_in), (n,), (d_in,), (n, d_out), (d_out,)])]
    weights = [w.requires_grad_() for w in weights]
    found = []
    for kernel in (reference, cuda):
        recycle(weights)
        code = encode(kernel, x, *weights[:3])
        error, residual = kernel.squared_error(target, code, *weights[3:])
        (error + (code.values**2).sum()).backward()
        found.append([error.detach(), residual, code.dense(n).detach(), *(w.grad.clone() for w in weights)])
    return zip(*found, strict=True)


@needs_device
@pytest.mark.parametrize("d_in, d_out, n, k, batch", [(16, 16, 40, 4, 9), (13, 5, 33, 33, 6), (37, 37, 130, 7, 3)])
def test_topk(d_in, d_out, n, k, batch):
    for expected, got in both(lambda m, *a: m.encode_topk(*a, k), d_in, d_out, n, batch):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@needs_device
def test_batchtopk_and_thresholds():
    threshold = made(50, seed=9).abs()
    for encode in (lambda m, *a: m.encode_batchtopk(*a, 40, 0.3), lambda m, *a: m.encode_over(*a, threshold)):
        for expected, got in both(encode, 12, 12, 50, 8):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@needs_device
def test_certified_candidates_give_the_float32_set():
    for expected, got in both(lambda m, *a: m.encode_topk(*a, 5), 48, 48, 300, 16, torch.float32):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_device
def test_rows_that_cannot_be_certified_are_computed_in_float32():
    from trainer.kernels import cuda

    x, W = made(6, 32, dtype=torch.float32), made(90, 32, seed=2, dtype=torch.float32)
    W[5] *= 1e6
    _, values = cuda.topk(x, W, torch.zeros(90, device=DEVICE), 4)
    expected = (x @ W.T).topk(4, dim=1).values.relu()
    torch.testing.assert_close(values.sort(dim=1, descending=True).values, expected, rtol=1e-4, atol=1e-3)


@needs_device
def test_gradients_are_added_to_what_is_there():
    from trainer.kernels import cuda

    W, b = made(20, 6).requires_grad_(), made(6, seed=1).requires_grad_()
    code = cuda.encode_topk(made(5, 6, seed=2), made(20, 6, seed=3), made(20, seed=4), None, 3)
    gradients = []
    for _ in range(2):
        cuda.squared_error(made(5, 6, seed=5), code._replace(values=code.values.detach()), W, b)[0].backward()
        gradients.append(W.grad.clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
