"""Fits of several processes equal the fit of one, and end in a named error when a process is lost. Real processes, gloo."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, StopRequestError, flip, stop_after
from safetensors.torch import load_file

from actstore.errors import UsageError
from trainer import FitConfig, FitProgress, find_run, fit
from trainer.code import of_k
from trainer.config import resolve
from trainer.distributed import ALONE, Ranks, connected
from trainer.kernels.sharded import top_of_all
from trainer.parallel import chosen_mesh
from trainer.sae import Widths

# 31 steps; the last has 27 rows of 127, which 2 or 4 ranks share unevenly; a third of the latents is dead: AuxK takes part.
CONFIG = FitConfig(n_latents=(66,), k=(4,), batch_size=127, rows=127 * 30 + 27, dead_after_rows=200)
BATCH = replace(CONFIG, arch=("batchtopk",))
CONFIGS = {
    "topk": CONFIG, "batchtopk": BATCH, "matryoshka": replace(CONFIG, arch=("matryoshka_batchtopk",)),
    "multi": replace(CONFIG, option={"multi_topk": True}),
}  # fmt: skip
ONE_ROW = replace(CONFIG, rows=127 * 3 + 1)  # in the last step all ranks but one have no row
FLEET = FitConfig(n_latents=(32, 66), k=(4, 8, 9), batch_size=128, rows=1500)
TOLERANCE = 2e-6  # of a tensor's largest value, after 31 steps; measured: 6e-7

# One launch does many fits, because a process takes seconds to start. argv: store, folder, what to do, rank to act.
RANK = """
import os, sys, time
sys.path.insert(0, "tests/trainer")
from actstore import open_store
from actstore.errors import ActstoreError
from test_distributed import BATCH, CONFIG, CONFIGS, FLEET, ONE_ROW
from trainer import FitProgress, fit
from trainer.distributed import connected
store, folder, what, actor = open_store(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def run(config, runs, way, at=10**9, act=lambda: None, stop=lambda: KeyboardInterrupt()):
    steps, mine = [], ranks.rank == actor
    step = lambda *_: (steps.append(1), act() if mine and len(steps) == at else None)
    progress = FitProgress(on_step=step, stop=lambda: stop() if mine and len(steps) >= at else None)
    return fit(store, config, f"{folder}/{runs}", parallel=way, ranks=ranks, progress=progress)

def stopped(config, runs, way, at):
    try:
        run(config, runs, way, at)
    except KeyboardInterrupt:
        return
    raise AssertionError("not stopped")

def again(wait_s):  # under another port
    os.environ["MASTER_PORT"] = os.environ["NEXT_PORT"]
    return connected(wait_s)

try:
    with connected(100) as ranks:
        if what == "equal":
            for name, config in CONFIGS.items():
                run(config, f"data-{name}", "data")
            for name in ("topk", "batchtopk"):
                run(CONFIGS[name], f"latents-{name}", "latents")
            run(ONE_ROW, "one-row", "data")
            stopped(BATCH, "moving", "latents", 10)
            stopped(BATCH, "moving-data", "data", 10)
            run(FLEET, "fleet", "auto")
        elif what == "go on":
            stopped(BATCH, "moving", "latents", 10)
            run(BATCH, "moving-data", "data")
            run(CONFIG, "from-one", "latents")
            run(ONE_ROW, "one-row-4", "data")
            print("done", flush=True)
            run(CONFIG, "killed", "latents", 5, lambda: os._exit(9), lambda: None)
    print("done", flush=True)
    with again(3) as ranks:
        run(CONFIG, "hanging", "data", 5, lambda: time.sleep(8), lambda: None)
except ActstoreError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


def free_ports() -> list[str]:
    """Two ports that are free now and that no system gives away by itself until they are used (those above 32767)."""
    found, port = [], 15_000 + os.getpid() % 15_000
    while len(found) < 2:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(str(port))
        port += 1
    return found


def launch(world: int, *argv: object) -> list[tuple[int, str]]:
    """Return exit code and output of each rank."""
    port, next_port = free_ports()
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NEXT_PORT": next_port,
              "OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"}  # fmt: skip
    command = [sys.executable, "-c", RANK, *map(str, argv)]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, outputs, strict=True)]


def weights(folder):
    (run,) = folder.glob("?" * 64)
    return load_file(run / "sae.safetensors"), [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal(folder, other):
    (ours, log), (its, its_log) = weights(folder), weights(other)
    for name, tensor in its.items():
        assert float((ours[name] - tensor).abs().max()) <= TOLERANCE * float(tensor.abs().max()), (folder, name)
    for line, its_line in zip(log, its_log, strict=True):
        assert line == pytest.approx(its_line, rel=1e-5), folder


@pytest.fixture(scope="module")
def one(toy_session_store, tmp_path_factory):
    """Folders of the same fits in one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, config in CONFIGS.items():
        fit(toy_session_store, config, folder / name)
    fit(toy_session_store, ONE_ROW, folder / "one-row")
    return folder


@pytest.fixture(scope="module")
def two(toy_session_store, tmp_path_factory):
    """What two ranks made of them, and checkpoints that they stopped at because rank 1 was asked to."""
    folder = tmp_path_factory.mktemp("two")
    found = launch(2, toy_session_store.path, folder, "equal", 1)
    assert all(text.startswith("done") for _, text in found), found
    return folder, found


@pytest.fixture(scope="module")
def four(two, toy_session_store):
    """The same folder after four ranks went on with what two ranks and one process had begun."""
    two, _ = two
    with pytest.raises(StopRequestError):
        fit(toy_session_store, CONFIG, two / "from-one", progress=stop_after(7))
    (run,) = (two / "moving").glob("?" * 64)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10.1.safetensors", "10.json", "10.safetensors"]
    found = launch(4, toy_session_store.path, two, "go on", 2)
    assert all(text.startswith("done") for _, text in found), found
    return two, found


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_that_share_the_rows_equal_one_process(one, two, name):
    assert_equal(two[0] / f"data-{name}", one / name)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_two_ranks_that_share_the_latents_equal_one_process(one, two, name):
    assert_equal(two[0] / f"latents-{name}", one / name)


def test_control_another_seed_is_not_equal(one, two, toy_session_store, tmp_path):
    fit(toy_session_store, replace(CONFIG, seed=(1,)), tmp_path)
    with pytest.raises(AssertionError):
        assert_equal(tmp_path, one / "topk")


def test_ranks_without_a_row_in_the_last_step_neither_hang_nor_differ(one, four):
    assert_equal(four[0] / "one-row", one / "one-row")
    assert_equal(four[0] / "one-row-4", one / "one-row")


def test_a_fit_goes_on_with_another_number_of_ranks(one, four, toy_session_store):
    """Latents: two ranks to step 10, four to step 20, one to the end. Rows: two, then four. One process, then four."""
    (run,) = (four[0] / "moving").glob("?" * 64)
    assert sorted(p.name for p in (run / "checkpoints").glob("20.*")) == [
        "20.1.safetensors", "20.2.safetensors", "20.3.safetensors", "20.json", "20.safetensors",
    ]  # fmt: skip
    shutil.copytree(four[0] / "moving", four[0] / "damaged")
    flip(four[0] / "damaged" / run.name / "checkpoints" / "20.2.safetensors", 2000)
    for folder, step in (("damaged", 10), ("moving", 20)):
        seen = []
        fit(toy_session_store, BATCH, four[0] / folder, progress=FitProgress(on_start=seen.append))
        assert seen[0]["first_step"] == step and len(seen[0]["complaints"]) == (folder == "damaged")
        assert_equal(four[0] / folder, one / "batchtopk")
    assert_equal(four[0] / "moving-data", one / "batchtopk")
    assert_equal(four[0] / "from-one", one / "topk")


def test_a_finished_run_of_ranks_is_an_ordinary_run(one, two):
    ours, its = (find_run(next((f).glob("?" * 64)).name, f) for f in (two[0] / "latents-topk", one / "topk"))
    assert {p.name for p in ours.path.iterdir()} == {p.name for p in its.path.iterdir()}
    for name, value in its.result["held_out"].items():
        its_value = ours.result["held_out"][name]
        assert its_value == (value if isinstance(value, dict) else pytest.approx(value)), name
    assert json.loads((ours.path / "environment.json").read_text())["ranks"] == 2


def test_a_fleet_over_ranks_is_bit_for_bit_the_fleet(two, toy_session_store, tmp_path):
    for result in fit(toy_session_store, FLEET, tmp_path):
        for name in ("sae.safetensors", "metrics.jsonl", "result.json"):
            assert (tmp_path / result.digest / name).read_bytes() == (two[0] / "fleet" / result.digest / name).read_bytes()


@pytest.mark.parametrize("ended, lost", [("four", 2), ("two", 1)], ids=["killed", "hanging"])
def test_a_lost_rank_ends_the_others_in_time_with_its_name(request, ended, lost):
    _, found = request.getfixturevalue(ended)
    for rank, (code, text) in enumerate(found):
        if rank != lost:
            assert code == 6 and f"RankLost: rank {lost} does not answer: waiting for " in text and "same command" in text, text


def test_ranks_that_never_come_are_missed(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="incomplete"), connected(1):
        pass


def test_equal_scores_at_the_cut_go_to_the_lower_latents():
    class Gathered(Ranks):
        """Rank 1 of two, whose partner has these candidates."""

        def gather(self, tensor, what):
            other = torch.tensor([[3.0, 2.0]]) if tensor.is_floating_point() else torch.tensor([[0, 5]])
            return [other, tensor]

    mine = of_k(torch.tensor([[1, 0]]), torch.tensor([[2.0, 2.0]]))  # latents 9 and 8 score as much as latent 5
    assert top_of_all(mine, 2, 8, Gathered(1, 2)).indices.tolist() == []
    assert top_of_all(of_k(torch.tensor([[1, 0]]), torch.tensor([[2.0, 4.0]])), 2, 8, Gathered(1, 2)).indices.tolist() == [0]
    assert top_of_all(mine, 2, 4, Gathered(1, 2)).indices.tolist() == [0]  # latents 5 and 4: 4 comes first


def test_what_ranks_cannot_share_is_refused_by_name():
    def choose(parallel, **fields):
        options = {"topk": (("multi_topk", True),)} if fields.pop("multi", False) else None
        saes = resolve(replace(CONFIG, **fields), 32, 10_000, options)
        return chosen_mesh(parallel, Ranks(0, 4), saes, Widths((32,)), 10**6)

    for parallel, fields in (
        ("data", {"arch": ("gated",)}), ("latents", {"arch": ("matryoshka_batchtopk",)}), ("data", {"dead": "resample"}),
        ("latents", {"n_latents": (3,), "k": (1,)}), ("data", {"batch_size": 3}), ("latents", {"multi": True}),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"--parallel|share"):
            choose(parallel, **fields)
    assert choose("auto", k=(1, 2, 3, 4)) is ALONE and choose("fleet", arch=("gated",)) is ALONE
    assert choose("auto").rows.world == 4 and choose("auto", n_latents=(100_000,)).latents.world == 4
