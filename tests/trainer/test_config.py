from __future__ import annotations

import pytest

from actstore.errors import UsageError
from trainer.config import FitConfig, SaeConfig, config_json, load_config, parse_config, resolve, run_digest


def test_a_fleet_is_every_combination_in_order():
    fleet = resolve(FitConfig(n_latents=(64, 128), k=(4, 8), seed=(0, 1)), d_model=16, train_rows=1000)
    assert [(c.n_latents, c.k, c.seed) for c in fleet] == [(n, k, s) for n in (64, 128) for k in (4, 8) for s in (0, 1)]
    assert all(c.rows == 1000 for c in fleet)


def test_a_run_digest_depends_on_the_sae_and_the_content_not_on_its_fleet():
    alone = resolve(FitConfig(n_latents=(64,), k=(8,)), 16, 1000)[0]
    in_fleet = resolve(FitConfig(n_latents=(64, 128), k=(4, 8)), 16, 1000)[1]
    assert run_digest(alone, "a" * 64) == run_digest(in_fleet, "a" * 64) != run_digest(alone, "b" * 64)


def test_epochs_and_rows_that_mean_the_same_are_the_same_run():
    by_epochs = resolve(FitConfig(n_latents=(64,), k=(8,), epochs=2), 16, 500)
    assert by_epochs == resolve(FitConfig(n_latents=(64,), k=(8,), rows=1000), 16, 500)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"k": (33,), "n_latents": (32,)}, "k"), ({"k": (0,)}, "k"), ({"k": ()}, "k"), ({"holdout": 1.0}, "holdout"),
        ({"epochs": 0}, "epochs"), ({"lr": (0.0,)}, "lr"), ({"batch_size": 0}, "batch_size"), ({"seed": (-1,)}, "seed"),
        ({"warmup_fraction": 0.9, "decay_fraction": 0.9}, "warmup_fraction"), ({"epochs": float("nan")}, "epochs"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(fields, name):
    with pytest.raises(UsageError, match=name):
        FitConfig(**fields)


def test_a_config_round_trips_and_unknown_fields_are_refused():
    config = resolve(FitConfig(), 16, 1000)[0]
    assert parse_config(config_json(config), SaeConfig, "x") == config
    with pytest.raises(UsageError, match="surprise"):
        parse_config({**config_json(config), "surprise": 1}, SaeConfig, "x")
    with pytest.raises(UsageError, match="n_latents"):
        parse_config({"n_latents": ["many"]}, FitConfig, "x")


def test_toml_files(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text("n_latents = [64, 128]\nk = 4\nepochs = 2.0\n")
    assert parse_config(load_config(path), FitConfig, "x") == FitConfig(n_latents=(64, 128), k=(4,), epochs=2.0)
    path.write_text("n_latents = [64")
    with pytest.raises(UsageError, match="TOML"):
        load_config(path)
    with pytest.raises(UsageError, match="does not exist"):
        load_config(tmp_path / "no.toml")
