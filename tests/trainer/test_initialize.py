"""What an SAE begins with, where a few rows are hundreds of times longer than the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer.checkpoint import new_sae
from trainer.config import FitConfig, resolve
from trainer.initialize import give_massive_rows_latents_, initialize_
from trainer.sae import Batch, Widths

D = 32


def rows_with_massive_ones():
    """500 ordinary rows of norm about 1; three along u and two along v of norm 50 to 200."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(500, D, generator=generator)) * (1 + 0.1 * torch.rand(500, 1, generator=generator))
    u, v = F.normalize(torch.randn(2, D, generator=generator))
    for row, (direction, norm) in enumerate(((u, 200), (v, -90), (u, 70), (v, -50), (u, 50))):
        x[40 * row] = direction * norm + 0.3 * x[40 * row]
    return x, u, -v


def sae_for(widths, **options):
    (config,) = resolve(FitConfig(n_latents=(64,), k=(4,), rows=1000, batch_size=100, **options), widths.d_in, 1000)
    sae = new_sae(config, widths)
    initialize_(sae, torch.zeros(widths.d_out), torch.zeros(widths.d_in) if widths.targets else None)
    return sae


def relative_errors(sae, x, y):
    with torch.no_grad():
        return (y - sae.decode(sae.encode(x))).norm(dim=1) / y.norm(dim=1)


def test_massive_rows_are_exact_before_the_first_step():
    x, u, v = rows_with_massive_ones()
    sae, massive = sae_for(Widths((D,))), slice(0, 200, 40)
    assert relative_errors(sae, x, x)[massive].max() > 0.1  # the control: random directions alone
    assert give_massive_rows_latents_(sae, Batch(x, x)) == 2
    assert relative_errors(sae, x, x)[massive].max() < 0.01
    for latent, direction in enumerate((u, v)):
        assert F.cosine_similarity(sae.W_dec[latent], direction, dim=0) > 0.99
    assert (sae.W_enc[2:] @ sae.W_dec[:2].T).abs().max() < 0.2  # the others lie across both
    assert (sae.W_enc[2:] @ sae.W_dec[1]).abs().max() < 1e-5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_without_massive_rows_nothing_changes():
    x, _, _ = rows_with_massive_ones()
    sae = sae_for(Widths((D,)))
    before = sae.W_enc.clone(), sae.W_dec.clone()
    assert give_massive_rows_latents_(sae, Batch(x[1:40], x[1:40])) == 0
    assert torch.equal(sae.W_enc, before[0]) and torch.equal(sae.W_dec, before[1])


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_a_transcoder_writes_what_follows_a_massive_row(arch):
    x, _, _ = rows_with_massive_ones()
    y = 3 * x @ F.normalize(torch.randn(D, 16, generator=torch.Generator().manual_seed(1)), dim=0)
    sae = sae_for(Widths((D,), (16,)), arch=(arch,))
    assert give_massive_rows_latents_(sae, Batch(x, y)) == 2
    if arch == "topk":
        assert relative_errors(sae, x, y)[:200:40].max() < 0.05
