from __future__ import annotations

import pytest
import torch

from trainer.checkpoint import new_sae
from trainer.code import of_k
from trainer.config import FitConfig, resolve
from trainer.initialize import geometric_median, initialize_
from trainer.kernels import cpu
from trainer.member import clip_gradients_
from trainer.normalize import Normalization, fold_
from trainer.optimize import MAX_GRADIENT_NORM, DeadLatents
from trainer.sae import Batch, Step, Widths


def make(d=8, n=32, k=4, **fields):
    (config,) = resolve(FitConfig(n_latents=(n,), k=(k,), **fields), d, 1000)
    sae = new_sae(config, Widths((d,)))
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
    normal = Normalization(torch.full((8,), scale), torch.zeros(8))
    fold_(sae, normal, normal)
    torch.testing.assert_close(sae.encode(x) * scale, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)) * scale, x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


def test_gradients_are_projected_and_clipped_together():
    """The decoder's gradient keeps its rows' norm to first order; all gradients then share one norm of at most 1."""
    sae, x = make(), 5 * torch.randn(20, 8)
    sae.losses(Batch(x, x), Step(0.0, torch.zeros(32, dtype=torch.bool), 1.0, cpu)).total.backward()
    of_encoder = sae.W_enc.grad.clone()
    clip_gradients_(sae, cpu)
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(32), atol=1e-6, rtol=0)
    norm = torch.cat([p.grad.flatten() for p in sae.parameters()]).norm()
    assert norm.item() == pytest.approx(MAX_GRADIENT_NORM, rel=1e-5) and sae.W_enc.grad.norm() < of_encoder.norm()
    small = [p.grad.mul_(0.5).clone() for p in sae.parameters()]
    clip_gradients_(sae, cpu)
    for p, before in zip(sae.parameters(), small, strict=True):
        torch.testing.assert_close(p.grad, before)


def test_the_geometric_median_ignores_massive_rows():
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    rows[:8] = 1e5
    assert geometric_median(rows).norm() < 0.2 < rows.mean(0).norm()


def test_dead_latents_are_counted_in_rows():
    (config,) = resolve(FitConfig(n_latents=(4,), k=(1,), dead_after_rows=10), 8, 1000)
    dead = DeadLatents(config, torch.device("cpu"))
    code = of_k(torch.tensor([[0], [1]] * 4), torch.tensor([[1.0], [0.0]] * 4))  # latent 1 is selected, but at zero
    dead.update_(code)
    dead.update_(of_k(torch.tensor([[0], [0]]), torch.ones(2, 1)))
    assert dead.since.tolist() == [0, 10, 10, 10] and not dead.dead().any()  # beyond ten rows, not at ten
    dead.update_(of_k(torch.tensor([[0]] * 6), torch.ones(6, 1)))
    assert dead.since.tolist() == [0, 16, 16, 16]
    assert dead.dead().tolist() == [False, True, True, True]


def test_an_unknown_architecture_lists_the_known_ones():
    from actstore.errors import UsageError
    from trainer.architectures import load_architecture

    with pytest.raises(UsageError) as caught:
        load_architecture("../topk")
    assert "topk" in caught.value.do
