"""Nearest latents against a plain matrix of cosines."""

from __future__ import annotations

import torch

from trainer import geometry
from trainer.geometry import cosine_histogram, max_cosines, nearest


def test_blocks_give_what_the_whole_matrix_gives(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(37, 8) * torch.rand(37, 1), torch.randn(23, 8)
    a[5] = 0
    monkeypatch.setattr(geometry, "COSINES_AT_ONCE", 60)  # two rows a block
    values, indices = nearest(a, b, 3)
    want = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    torch.testing.assert_close(values, want.topk(3).values)
    torch.testing.assert_close(want.gather(1, indices), values)
    assert values[5].tolist() == [0, 0, 0]


def test_a_latent_is_not_its_own_neighbour(monkeypatch):
    torch.manual_seed(1)
    w = torch.randn(50, 6)
    w[7] = 2 * w[40]
    monkeypatch.setattr(geometry, "COSINES_AT_ONCE", 200)
    values, others = max_cosines(w)
    assert (others[7], others[40]) == (40, 7) and values[7] > 0.99999
    assert (others != torch.arange(50)).all()
    assert sum(cosine_histogram(values).latents) == 50


def test_opposite_latents_have_cosine_minus_one():
    values, others = max_cosines(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert values.tolist() == [-1, -1] and others.tolist() == [1, 0]


def test_one_latent_has_no_neighbour():
    assert max_cosines(torch.ones(1, 4))[0].tolist() == [0]
