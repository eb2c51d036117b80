"""Every kernel equals plain autograd in float64, over shapes that are not multiples of anything, ties and dead latents."""

from __future__ import annotations

import pytest
import torch

from trainer import kernels
from trainer.architectures import architecture_names, load_architecture
from trainer.config import FitConfig, resolve
from trainer.kernels import reference, sparse

SHAPES = [(16, 64, 4, 32), (13, 50, 7, 33), (8, 8, 8, 5), (5, 40, 1, 1)]  # d_model, n_latents, k, batch


def make(arch, d, n, k, dtype=torch.float64):
    (config,) = resolve(FitConfig(arch=(arch,), n_latents=(n,), k=(k,)), d, 1000)
    sae = load_architecture(arch)(config, d).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return sae


def gradients(sae, x, dead, kernel):
    sae.zero_grad()
    losses = sae.losses(x, dead, 1.7, kernel)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize("arch", architecture_names())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_dead", [0, 3])
def test_losses_and_gradients_agree(arch, shape, n_dead):
    d, n, k, batch = shape
    sae = make(arch, d, n, k)
    x = torch.randn(batch, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0] = 0
    dead = torch.zeros(n, dtype=torch.bool)
    dead[:n_dead] = True
    expected, of_reference = gradients(sae, x, dead, reference)
    got, of_sparse = gradients(sae, x, dead, sparse)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    for name, gradient in of_reference.items():
        torch.testing.assert_close(of_sparse[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
        assert gradient.abs().sum() > 0, f"no gradient reaches {name}"


def test_the_auxiliary_loss_teaches_dead_latents_only():
    """AuxK adds gradient to dead latents, none to live ones, and nothing when its weight is zero."""
    sae = make("topk", 8, 30, 2)
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    never = torch.ones(30, dtype=torch.bool)
    never[sae.encode_sparse(x).indices.unique()] = False
    assert 0 < never.sum() < 30
    _, without = gradients(sae, x, torch.zeros_like(never), reference)
    losses, with_aux = gradients(sae, x, never, reference)
    assert 0 < losses.auxiliary < 1.5
    changed = (with_aux["W_dec"] != without["W_dec"]).any(dim=1)
    assert changed.any() and not (changed & ~never).any()
    assert torch.equal(with_aux["b_dec"], without["b_dec"])


def test_the_plain_formula_by_hand():
    """One row, two latents, k 1: loss and gradients of Gao et al. 2024, section 2.3, worked out on paper."""
    sae = make("topk", 2, 2, 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        sae.b_enc.zero_(), sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)  # pre (2, 1): latent 0, value 2; x̂ = (1, 2); residual (2, -1)
    for kernel in (reference, sparse):
        losses, grad = gradients(sae, x, torch.zeros(2, dtype=torch.bool), kernel)
        assert losses.squared_error.item() == 5 and losses.code.indices.item() == 0 and losses.code.values.item() == 2
        # dL/dx̂ = -2 r / 1.7; dz = dL/dx̂ · W_dec[0] = -2 (-1) / 1.7
        g = torch.tensor([-4.0, 2.0], dtype=torch.float64) / 1.7
        torch.testing.assert_close(grad["W_dec"], torch.stack([g * 2, g * 0]))
        torch.testing.assert_close(grad["W_enc"], torch.stack([torch.tensor([2.0, 1.0], dtype=torch.float64) * g[1], g * 0]))
        torch.testing.assert_close(grad["b_dec"], g - torch.tensor([1.0, 0.0], dtype=torch.float64) * g[1])


def test_encode_decode_and_ties():
    sae = make("topk", 6, 20, 5, torch.float32)
    x = torch.randn(9, 6)
    codes = sae.encode(x)
    assert ((codes != 0).sum(1) <= 5).all() and (codes >= 0).all()
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(codes.max(1).values, pre.max(1).values.relu())
    torch.testing.assert_close(sae.decode(codes), codes @ sae.W_dec + sae.b_dec)
    tied = torch.zeros(3, 6)
    assert sae.encode(tied).shape == (3, 20)


def test_choice_of_kernel():
    assert kernels.choose("reference", 1, 1000) is reference
    assert kernels.choose("fast", 999, 1000) is sparse
    assert kernels.choose("auto", 10, 1000) is sparse and kernels.choose("auto", 101, 1000) is reference
