"""Metrics against values computed by hand: loops over 20 rows, one definition after another, no code of ours."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from actstore.capture import capture
from actstore.catalog import open_store
from trainer import metrics
from trainer.checkpoint import new_sae
from trainer.config import FitConfig, resolve
from trainer.initialize import initialize_
from trainer.metrics import measure
from trainer.sae import Widths

DEVICE = torch.device("cpu")
BATCH = 7


def make(store, n_latents=12, k=3):
    (config,) = resolve(FitConfig(n_latents=(n_latents,), k=(k,)), store.d_model, 1000)
    sae = new_sae(config, Widths((store.d_model,)))
    initialize_(sae, torch.from_numpy(store[:].mean(0)))
    return sae


def by_hand(rows, codes, W_dec, b_dec):
    """Every metric of 20 rows at most, from Python floats."""
    n, d = len(rows), len(rows[0])
    hats = [
        [sum(c * w for c, w in zip(z, column, strict=True)) + b for column, b in zip(W_dec, b_dec, strict=True)] for z in codes
    ]
    squared = lambda v: sum(a * a for a in v)  # noqa: E731
    minus = lambda v, w: [a - b for a, b in zip(v, w, strict=True)]  # noqa: E731
    mean = lambda vs: [statistics.fmean(column) for column in zip(*vs, strict=True)]  # noqa: E731
    errors = [squared(minus(x, h)) for x, h in zip(rows, hats, strict=True)]
    around = [squared(minus(x, mean(rows))) for x in rows]
    in_batch = []  # squared distance of each row from its batch's mean
    for start in range(0, n, BATCH):
        part = rows[start : start + BATCH]
        in_batch += [squared(minus(x, mean(part))) for x in part]
    variance = lambda vs: sum(statistics.pvariance(column) for column in zip(*vs, strict=True))  # noqa: E731
    dots = [sum(a * b for a, b in zip(x, h, strict=True)) for x, h in zip(rows, hats, strict=True)]
    norms, hat_norms = [math.sqrt(squared(x)) for x in rows], [math.sqrt(squared(h)) for h in hats]
    times = [sum(z[i] != 0 for z in codes) for i in range(len(codes[0]))]
    return {
        "rows": n,
        "fvu": sum(errors) / sum(around),
        "explained_variance": 1 - sum(errors) / sum(around),
        "explained_variance_legacy": statistics.fmean(1 - e / v for e, v in zip(errors, in_batch, strict=True)),
        "fvu_by_batch": sum(errors) / sum(in_batch),
        "frac_variance_explained": 1 - variance([minus(x, h) for x, h in zip(rows, hats, strict=True)]) / variance(rows),
        "mse_per_token": statistics.fmean(errors),
        "mse_per_element": sum(errors) / (n * d),
        "nmse_per_token": statistics.fmean(e / norm**2 for e, norm in zip(errors, norms, strict=True)),
        "cosine": statistics.fmean(dot / (a * b) for dot, a, b in zip(dots, norms, hat_norms, strict=True)),
        "l2_ratio": statistics.fmean(b / a for a, b in zip(norms, hat_norms, strict=True)),
        "relative_reconstruction_bias": sum(h * h for h in hat_norms) / sum(dots),
        "l0": sum(times) / n,
        "inactive_fraction": times.count(0) / len(times),
        "denser_than_1_percent": sum(t > 0.01 * n for t in times) / len(times),
        "denser_than_10_percent": sum(t > 0.1 * n for t in times) / len(times),
    }


def test_every_number_equals_its_definition_on_20_rows(toy_request, monkeypatch):
    request = toy_request(model="toy:5", seq_len=8, rows=20)
    store = open_store(capture(request)[0], request.stores)
    sae = make(store)
    monkeypatch.setattr(metrics, "BATCH_ROWS", BATCH)
    monkeypatch.setattr(metrics, "LEAST_ROWS", 1)
    numbers = measure(sae, store, range(20), DEVICE).numbers()
    x = torch.from_numpy(store[:].copy())
    codes = sae.encode(x).detach().double().tolist()
    weights = (sae.W_dec.detach().T.double().tolist(), sae.b_dec.detach().double().tolist())
    assert store.rows == 20 and numbers["batch_rows"] == BATCH and 0.1 < numbers["fvu"] < 2
    assert set(store.read("tokens", 0, 20).tolist()) & set(store.vocabulary.special)  # BOS
    positions = store.read("positions", 0, 20).tolist()
    assert positions.count(0) == 3
    for name, value in by_hand(x.double().tolist(), codes, *weights).items():
        assert numbers[name] == pytest.approx(value, rel=1e-5), name
    # Without special tokens a batch is what is left of it: by_hand cuts 7 rows at a time, so each batch goes alone.
    plain = [i for i, p in enumerate(positions) if p > 0]
    wanted = by_hand([x.double().tolist()[i] for i in plain], [codes[i] for i in plain], *weights)
    for name, value in wanted.items():
        if name not in ("explained_variance_legacy", "fvu_by_batch"):
            assert numbers[f"{name}_no_special"] == pytest.approx(value, rel=1e-5), name
    assert sum(numbers["density"]["latents"]) + numbers["density"]["never"] == 12


def test_batches_and_row_numbers_do_not_change_a_number(toy_session_store, monkeypatch):
    store, sae = toy_session_store, make(toy_session_store, 64, 4)
    whole = measure(sae, store, np.arange(5, store.rows, 3), DEVICE).numbers()
    monkeypatch.setattr(metrics, "BATCH_ROWS", 100)
    parts = measure(sae, store, np.arange(5, store.rows, 3), DEVICE).numbers()
    by_batch = ("legacy", "by_batch", "batch_rows", "density")
    for name in (name for name in whole if not any(part in name for part in by_batch)):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6), name
    assert parts["explained_variance_legacy"] != whole["explained_variance_legacy"]


def test_a_mean_far_from_zero_costs_no_digits(toy_session_store):
    """μ is subtracted in float64 before anything is squared."""
    store, sae = toy_session_store, make(toy_session_store, 64, 4)
    rows = np.arange(store.rows)
    x = store[:].astype(np.float64)
    numbers = measure(sae, store, rows, DEVICE).numbers()
    assert numbers["mse_per_token"] / numbers["fvu"] == pytest.approx(x.var(0).sum(), rel=1e-9)


def test_no_rows_give_no_numbers_but_no_crash(toy_session_store):
    numbers = measure(make(toy_session_store, 8, 2), toy_session_store, np.zeros(0, np.int64), DEVICE).numbers()
    assert numbers["rows"] == 0 and numbers["explained_variance"] is None and numbers["l0_no_special"] is None
