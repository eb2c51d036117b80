"""The order of rows: each exactly once an epoch, any slice from nothing, and really mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.batches import Batches, Runs, split_rows
from trainer.config import FitConfig, resolve
from trainer.feed import feed, gather
from trainer.order import Order, companions, make_order, permute
from trainer.sources import Sources, to_tensor

CPU = torch.device("cpu")


@given(st.integers(1, 5000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)  # the first one compiles
def test_permute_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permutations_of_few_elements_are_even():
    """4,800 keyed permutations of 4: chi-square over the 24 outcomes, 23 degrees of freedom, 99.9 % limit 49.7."""
    seen: dict[tuple[int, ...], int] = {}
    for key in range(4_800):
        outcome = tuple(permute(np.arange(4), 4, key).tolist())
        seen[outcome] = seen.get(outcome, 0) + 1
    assert len(seen) == 24 and sum((c - 200) ** 2 / 200 for c in seen.values()) < 49.7


@pytest.mark.parametrize(
    "rows, block, window", [(100_003, 16, 256), (5000, 64, 8), (999, 1024, 16), (65536, 256, 64), (1, 16, 8), (17, 1, 8)]
)
def test_each_row_exactly_once_an_epoch(rows, block, window):
    order = Order(rows, block, window, seed=3)
    epochs = [np.concatenate([order.rows_of_window(e, w) for w in range(order.n_windows)]) for e in (0, 1)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(rows))
    assert rows < 10 or not np.array_equal(*epochs)


def batches_of(store, batch_size=64, order=None, **fields):
    config = FitConfig(n_latents=(64,), k=(4,), batch_size=batch_size, **fields)
    split = split_rows(store, config)
    (sae,) = resolve(config, store.d_model, split.n_train)
    return Batches(
        Sources((store,)),
        split,
        order or make_order(split.n_train, store.d_model * 4, sae, store.manifest.group_rows),
        batch_size,
    )


@pytest.mark.parametrize("order", [None, (4, 128), (1, 512)])
def test_every_step_is_the_same_from_nothing_and_in_a_row(toy_session_store, order):
    batches = batches_of(toy_session_store, 100)
    n = batches.split.n_train
    if order:
        batches = batches_of(toy_session_store, 100, Order(n, *order, seed=1))
    rows = 2 * n + 37
    stream = [b.clone() for (b,) in batches.iterate(0, rows, CPU)]
    assert [len(b) for b in stream] == [100] * (rows // 100) + [rows % 100]
    for step in (1, n // 100, n // 100 + 1, len(stream) - 1):
        assert torch.equal(next(batches.iterate(step, rows, CPU))[0], stream[step])
    # an epoch, put back in order, is the store's rows to train on
    epoch = torch.cat(stream)[:n]
    expected = toy_session_store[:] if batches.split.train is None else toy_session_store[:][batches.split.train]
    assert torch.equal(epoch[np.lexsort(epoch.numpy().T)], torch.from_numpy(expected[np.lexsort(expected.T)]))


def test_rows_are_mixed_as_the_formula_says():
    rows, batch = 1 << 18, 4096
    documents = np.arange(rows) // 512
    for block, window in ((16, 2048), (256, 128), (1, rows)):
        order = Order(rows, block, window, seed=0)
        stream = order.rows_of_window(0, 0)[: 4 * batch].reshape(4, batch)
        seen = []
        for rows_of_batch in stream:
            _, counts = np.unique(documents[rows_of_batch], return_counts=True)
            seen.append((counts * (counts - 1)).sum() / batch)
        expected, ideal = companions(order, batch, 512)
        assert np.mean(seen) == pytest.approx(expected, rel=0.12)
        assert expected >= ideal * 0.99


def test_held_out_documents_are_whole_and_the_same_for_every_seed(toy_session_store):
    a, b = (split_rows(toy_session_store, FitConfig(holdout=0.1, seed=(s,), shuffle_seed=s)) for s in (0, 1))
    assert np.array_equal(a.held_out, b.held_out) and len(a.held_out)
    documents = toy_session_store.read("documents", 0, toy_session_store.rows)
    assert not set(documents[a.held_out]) & set(documents[a.train])
    assert len(set(documents[a.held_out])) == round(0.1 * len(set(documents)))
    assert len(a.held_out) + a.n_train == toy_session_store.rows


def test_positions_and_special_tokens_can_be_left_out(toy_session_store):
    store = toy_session_store
    split = split_rows(store, FitConfig(skip_positions=3))
    positions = store.read("positions", 0, store.rows)
    assert positions[split.train].min() == 3 == positions[split.held_out].min()
    tokens = store.read("tokens", 0, store.rows)
    assert 256 not in tokens[split_rows(store, FitConfig(exclude_special=True)).train]
    everything = split_rows(store, FitConfig(holdout=0))
    assert everything.train is None and everything.n_train == store.rows and not len(everything.held_out)


def test_bfloat16_rows_become_tensors_bit_for_bit():
    import ml_dtypes

    x = np.array([[1.5, -2.25, 3e38]], ml_dtypes.bfloat16)
    assert to_tensor(x).dtype is torch.bfloat16 and to_tensor(x).float().tolist() == x.astype(np.float32).tolist()


def test_a_tensor_never_shares_memory_with_a_read_only_map(toy_session_store):
    x = to_tensor(toy_session_store[:4])
    x += 1  # would end the process if it were the map


def test_the_order_is_what_it_was():
    """Pinned: a checkpoint's position means the same rows in every version."""
    assert permute(np.arange(12), 12, key=7).tolist() == [11, 1, 10, 7, 5, 9, 8, 6, 0, 4, 2, 3]
    assert Order(1000, 8, 16, 5).rows_of_window(1, 2)[:8].tolist() == [794, 863, 668, 418, 550, 828, 230, 299]


HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_gathered_converted_and_scaled_exactly(dtype):
    """Every finite float16, subnormal ones and both zeros too; scaled by what float32 arithmetic gives."""
    import ml_dtypes

    numbers = HALVES[np.isfinite(HALVES)].astype(np.float32)[: 63488 // 62 * 62].reshape(-1, 62)
    rows = numbers.astype({"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype])
    places = np.random.default_rng(0).integers(0, len(rows), 2000)
    out = torch.empty(2000, 62)
    for scale in (1.0, 0.37):
        gather(rows, places, scale, out)
        expected = torch.from_numpy(rows.astype(np.float32)[places]) * np.float32(scale)
        assert torch.equal(out, expected) and torch.equal(out.signbit(), expected.signbit())


def test_a_batch_may_cross_windows_and_is_valid_until_the_next():
    rows = np.arange(21, dtype=np.float32).reshape(7, 3)
    windows = [((rows[:4],), np.array([2, 0, 1, 3])), ((rows[4:],), np.array([2, 0, 1]))]
    found = [(batch.data_ptr(), batch.clone()) for (batch,) in feed(windows, 3, CPU, [2.0])]
    assert [batch[:, 0].tolist() for _, batch in found] == [[12, 0, 6], [18, 36, 24], [30]]
    assert len({pointer for pointer, _ in found}) == 2


def test_runs_are_the_rows_that_masks_keep():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98, 0.0, 1.0):
        masks = [rng.random(n) < share for n in (1000, 1, 777)]
        firsts = np.cumsum([0, 1000, 1]).tolist()
        runs = Runs.of(zip(firsts, masks, strict=True))
        rows = np.flatnonzero(np.concatenate(masks))
        assert len(runs) == len(rows) and np.array_equal(np.asarray(runs), rows)
        places = rng.permutation(len(rows))
        assert np.array_equal(runs[places], rows[places]) and runs[places].dtype == np.int64
    far = Runs.of([(10**12, np.ones(5, bool))])
    assert far[np.array([4])].tolist() == [10**12 + 4]


@pytest.mark.parametrize("rows", [10**9, 10**12])
def test_an_epoch_of_a_huge_store_is_sampled_in_the_size_of_a_window(rows):
    """Integer widths: block numbers pass 2^32, rows pass 2^39; windows at both ends of an epoch do not overlap."""
    order = Order(rows, block=8, window=2048, seed=3)
    first, last = order.rows_of_window(0, 0), order.rows_of_window(0, order.n_windows - 1)
    for found in (first, last):
        assert len(np.unique(found)) == len(found) and 0 <= found.min() <= found.max() < rows
    assert len(first) == order.window_rows and not set(first) & set(last)
    assert first.max() > 0.99 * rows and abs(first.mean() / rows - 0.5) < 0.05
