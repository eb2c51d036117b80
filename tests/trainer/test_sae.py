from __future__ import annotations

import pytest
import torch

from trainer.checkpoint import new_sae
from trainer.config import FitConfig, resolve
from trainer.optimize import DeadLatents
from trainer.sae import SparseCode, fold_scale_, geometric_median, initialize_, normalize_decoder_, project_decoder_gradient_


def make(d=8, n=32, k=4, **fields):
    (config,) = resolve(FitConfig(n_latents=(n,), k=(k,), **fields), d, 1000)
    sae = new_sae(config, d)
    initialize_(sae, torch.arange(d).float())
    return sae


def test_initial_weights_follow_the_seed():
    a, b, c = make(), make(), make(seed=(7,))
    assert torch.equal(a.W_enc, b.W_enc) and not torch.equal(a.W_enc, c.W_enc)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(a.W_enc, a.W_dec) and torch.equal(a.b_dec, torch.arange(8).float())


def test_folding_the_scale_gives_the_same_sae_in_the_stores_units():
    sae, x, scale = make(), torch.randn(20, 8) * 30, 0.02
    with torch.no_grad():
        sae.b_enc.normal_()
    codes, x_hat = sae.encode(x * scale), sae.decode(sae.encode(x * scale))
    fold_scale_(sae, scale)
    torch.testing.assert_close(sae.encode(x) * scale, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)) * scale, x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


def test_the_projected_gradient_keeps_the_norm_to_first_order():
    sae = make()
    sae.W_dec.grad = torch.randn_like(sae.W_dec)
    project_decoder_gradient_(sae)
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(32), atol=1e-6, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    normalize_decoder_(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


def test_the_geometric_median_ignores_massive_rows():
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    rows[:8] = 1e5
    assert geometric_median(rows).norm() < 0.2 < rows.mean(0).norm()


def test_dead_latents_are_counted_in_rows():
    (config,) = resolve(FitConfig(n_latents=(4,), k=(1,), dead_after_rows=10), 8, 1000)
    dead = DeadLatents(config, torch.device("cpu"))
    code = SparseCode(torch.tensor([[0], [1]] * 4), torch.tensor([[1.0], [0.0]] * 4))  # latent 1 is selected, but at zero
    dead.update_(code)
    assert not dead.dead().any()
    dead.update_(code)
    assert dead.since.tolist() == [0, 16, 16, 16]
    assert dead.dead().tolist() == [False, True, True, True]


def test_an_unknown_architecture_lists_the_known_ones():
    from actstore.errors import UsageError
    from trainer.architectures import load_architecture

    with pytest.raises(UsageError) as caught:
        load_architecture("../topk")
    assert "topk" in caught.value.do
