"""Metrics against values computed by hand on a small store."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.checkpoint import new_sae
from trainer.config import FitConfig, resolve
from trainer.initialize import initialize_
from trainer.metrics import measure
from trainer.sae import Widths


def test_every_number_equals_its_definition(toy_session_store):
    store = toy_session_store
    (config,) = resolve(FitConfig(n_latents=(64,), k=(4,)), store.d_model, 1000)
    sae = new_sae(config, Widths((store.d_model,)))
    initialize_(sae, torch.from_numpy(store[:].mean(0)))
    rows = np.arange(5, store.rows, 3)
    numbers = measure(sae, store, rows, torch.device("cpu")).numbers()
    x = torch.from_numpy(store[:][rows]).double()
    codes = sae.encode(x.float())
    x_hat = sae.decode(codes).detach().double()

    def ev(kept):
        a, b = x[kept], x_hat[kept]
        return float(1 - (a - b).square().sum() / (a - a.mean(0)).square().sum())

    everything = torch.ones(len(rows), dtype=torch.bool)
    plain = torch.from_numpy(store.read("positions", 0, store.rows)[rows] > 0)
    assert numbers["rows"] == len(rows) and numbers["rows_no_special"] == int(plain.sum()) < len(rows)
    assert numbers["explained_variance"] == pytest.approx(ev(everything), rel=1e-7)
    assert numbers["explained_variance_no_special"] == pytest.approx(ev(plain), rel=1e-7)
    assert numbers["fvu"] == pytest.approx(1 - ev(everything), rel=1e-7)
    assert numbers["mse_per_token"] == pytest.approx(float((x - x_hat).square().sum(1).mean()), rel=1e-7)
    assert numbers["l0"] == pytest.approx(float((codes != 0).sum(1).double().mean()))
    assert numbers["inactive_fraction"] == pytest.approx(float((codes == 0).all(0).double().mean()))
    assert sum(numbers["density"]["latents"]) + numbers["density"]["never"] == 64


def test_no_rows_give_no_numbers_but_no_crash(toy_session_store):
    (config,) = resolve(FitConfig(n_latents=(8,), k=(2,)), toy_session_store.d_model, 10)
    sae = new_sae(config, Widths((toy_session_store.d_model,)))
    initialize_(sae, torch.zeros(toy_session_store.d_model))
    numbers = measure(sae, toy_session_store, np.zeros(0, np.int64), torch.device("cpu")).numbers()
    assert numbers["rows"] == 0 and numbers["explained_variance"] is None
