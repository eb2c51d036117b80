"""The reference study's training and table, against its definitions written out in plain torch (research/ecosystem.md, 3.2)."""

from __future__ import annotations

import itertools
import json
import statistics

import numpy as np
import pytest
import torch
from actstore_cli.actstore import main as actstore_main
from actstore_cli.trainer import main as trainer_main
from click.testing import CliRunner
from helpers import TINY, StopRequestError, stop_after, write_jsonl
from torch import nn

from actstore.catalog import open_store
from trainer import FitConfig, fit, load_sae
from trainer.reference_study import fit_study

SEQ_LEN, TOGETHER = 32, 14
N, K, EPOCHS, BATCH, LR, SEED = 300, 6, 3, 50, 1e-3, 7
GIVEN = {"n_latents": N, "k": K, "epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "seed": SEED}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in GIVEN.items()]


def run(main, *args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_corpus):
    """Texts as the study reads them, and the folder of a store of them captured by --preset reference."""
    folder = tmp_path_factory.mktemp("study")
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()][:20]
    texts = ["\n  " + texts[0], " ", "a short one", *texts[1:], "another short one"]
    result = run(
        actstore_main, "capture", "--preset", "reference", "--model", TINY, "--hook", "blocks.2.hook_resid_pre",
        "--corpus", write_jsonl(folder / "corpus.jsonl", texts), "--seq-len", SEQ_LEN, "--pad-together", TOGETHER,
        "--stores", folder / "stores",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder, [text.strip() for text in texts if text.strip()], open_store(result.stdout.strip(), folder / "stores")


@pytest.fixture(scope="module")
def fitted(home):
    """The object that `trainer fit --preset reference --json` prints, and the folder of runs."""
    folder, _, store = home
    before = torch.random.get_rng_state()
    result = run(
        trainer_main, "fit", "--preset", "reference", "--store", store.digest, "--stores", folder / "stores",
        "--runs", folder / "runs", "--json", *FLAGS,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert torch.equal(before, torch.random.get_rng_state())
    return json.loads(result.stdout), folder / "runs"


# --- the definitions, once more ---------------------------------------------------------------------------------------


class TopK(nn.Module):
    def __init__(self, d, n, k):
        super().__init__()
        self.encoder, self.decoder, self.k = nn.Linear(d, n), nn.Linear(n, d), k
        with torch.no_grad():
            self.decoder.weight.copy_(self.encoder.weight.t())
            self.decoder.bias.zero_()

    def forward(self, x):
        pre = self.encoder(x)
        values, at = torch.topk(pre, self.k, dim=-1)
        codes = torch.zeros_like(pre)
        codes.scatter_(-1, at, values)
        return self.decoder(codes), codes


def study(x):
    """Return the SAE, the losses before and after on the first rows, and those of each epoch."""
    torch.manual_seed(SEED)
    sae = TopK(x.shape[1], N, K)
    adam = torch.optim.Adam(sae.parameters(), lr=LR)

    def first():
        with torch.no_grad():
            return torch.mean((x[:BATCH] - sae(x[:BATCH])[0]) ** 2).item()

    initial, epochs = first(), []
    for _ in range(EPOCHS):
        order, total, batches = torch.randperm(len(x)), 0.0, 0
        for start in range(0, len(x), BATCH):
            batch = x[order[start : start + BATCH]]
            loss = torch.mean((batch - sae(batch)[0]) ** 2)
            adam.zero_grad()
            loss.backward()
            adam.step()
            total, batches = total + loss.item(), batches + 1
        epochs.append(total / batches)
    return sae, initial, first(), epochs


def jaccard(labels):
    sets = [set(label.lower().split()) for label in labels]
    pairs = list(itertools.combinations(sets, 2))
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def study_features(codes, label_of_row):
    """Return for each live latent its largest |code| and its labels."""
    found = {}
    for i in range(codes.shape[1]):
        column = codes[:, i].abs()
        active = int((codes[:, i] != 0).sum())
        if active:
            values, rows = torch.topk(column, k=min(5, active))
            labels = []
            for row in rows.tolist():
                if label_of_row[row] not in labels:
                    labels.append(label_of_row[row])
            found[i] = values[0].item(), 1.0 if len(labels) == 1 else jaccard(labels), labels
    return found


@pytest.fixture(scope="module")
def again(home):
    store = home[2]
    rows = int(np.flatnonzero(np.diff(store.read("documents", 0, store.rows)))[TOGETHER - 1]) + 1
    with torch.random.fork_rng():
        return rows, study(torch.tensor(store[:rows]))


# --- equal ------------------------------------------------------------------------------------------------------------


def test_the_weights_are_the_studys_bit_for_bit(fitted, again):
    printed, runs = fitted
    sae, (rows, (plain, *_)) = load_sae(printed["runs"][0]["digest"], runs), again
    assert torch.equal(sae.W_enc, plain.encoder.weight) and torch.equal(sae.b_enc, plain.encoder.bias)
    assert torch.equal(sae.W_dec, plain.decoder.weight.T) and torch.equal(sae.b_dec, plain.decoder.bias)
    assert sae.config.rows == rows * EPOCHS and sae.b_enc.abs().max() > 0.01 and sae.b_dec.abs().max() > 0.01


def test_the_table_is_the_studys(fitted, again, home):
    _, texts, store = home
    got, (rows, (plain, initial, final, epochs)) = fitted[0]["reference"], again
    x = torch.tensor(store[:rows])
    with torch.no_grad():
        recon, codes = plain(x)
    mse = torch.mean((x - recon) ** 2).item()
    longest = rows // TOGETHER
    labels = [f"doc_{i}: {texts[i][:60]}" for i in range(TOGETHER) for _ in range(longest)]
    features = study_features(codes, labels)
    coherences = [coherence for _, coherence, _ in features.values()]
    assert got["rows"] == rows == TOGETHER * longest and got["documents"] == TOGETHER
    assert (got["initial_mse"], got["final_mse"], got["losses_per_epoch"]) == (initial, final, epochs)
    assert got["reduction"] == pytest.approx(1 - final / initial, rel=1e-12) and final < 0.8 * initial
    assert got["reconstruction_mse"] == pytest.approx(mse, rel=1e-6)
    assert got["explained_variance"] == pytest.approx(1 - mse / torch.var(x, unbiased=False).item(), rel=1e-6)
    assert got["mean_latents_per_row"] == K and got["weight_bytes"] == N * store.d_model * 8
    assert (got["live"], got["dead"]) == (len(features), N - len(features)) and 0 < got["dead"] < N
    assert got["median_coherence"] == pytest.approx(statistics.median(coherences), rel=1e-9)
    assert got["coherence_is_1"] == sum(c == 1.0 for c in coherences) > 0
    assert got["coherence_over_0.3"] == sum(c > 0.3 for c in coherences) < len(features)
    top = sorted(features.items(), key=lambda item: item[1][0], reverse=True)[:10]
    assert len(fitted[0]["latents"]) == 10
    for latent, (index, (largest, coherence, prompts)) in zip(fitted[0]["latents"], top, strict=True):
        mine = latent["reference"]
        assert latent["latent"] == index and mine["prompt"] == prompts[0]
        assert mine["max_activation"] == pytest.approx(largest, rel=1e-6) and mine["coherence"] == pytest.approx(coherence)


def test_the_honest_numbers_are_of_unseen_text(fitted, again, home):
    """No BOS, no padding, no document of the training; explained variance with a mean a dimension; distinct documents."""
    _, texts, store = home
    got, (rows, (plain, *_)) = fitted[0]["honest"], again
    tokens, documents = (store.read(name, rows, store.rows) for name in ("tokens", "documents"))
    kept = tokens != 0  # BOS and padding are token 0
    assert kept.sum() < len(kept) - len(np.unique(documents))  # there is padding among the rows left out
    x, documents = torch.tensor(store[rows:])[kept].double(), documents[kept]
    plain = plain.double()
    with torch.no_grad():
        recon, codes = plain(x)
    plain.float()
    assert got["rows"] == len(x) and got["documents"] == len(texts) - TOGETHER
    assert got["final_mse"] == pytest.approx((x - recon).square().mean().item(), rel=1e-4)
    explained = 1 - (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    assert got["explained_variance"] == pytest.approx(explained.item(), rel=1e-4)
    assert got["live"] == int((codes != 0).any(0).sum()) == N - got["dead"] and got["dead_window_rows"] == len(x)
    names, coherences = np.unique(documents), {}
    text_of = dict(zip(names.tolist(), texts[TOGETHER:], strict=True))
    for i in range(N):
        best = {d: codes[documents == d, i].abs().max().item() for d in names.tolist()}
        top = sorted((d for d in best if best[d] > 0), key=lambda d: -best[d])[:5]
        if len(top) > 1:
            coherences[i] = jaccard([text_of[d][:60] for d in top])
    # In float64 a row may have another k-th latent of two nearly equal ones, and a latent another fifth document.
    assert got["median_coherence"] == pytest.approx(statistics.median(coherences.values()), rel=0.1)
    assert got["coherence_is_1"] == 0  # a latent of one document is no longer coherent for that
    for latent in fitted[0]["latents"]:
        if latent["honest"] is not None and latent["honest"]["coherence"] is not None:
            assert latent["honest"]["coherence"] == pytest.approx(coherences[latent["latent"]])
            assert "«" in latent["honest"]["prompt"]


# --- as a command -----------------------------------------------------------------------------------------------------


def test_it_is_an_ordinary_run_and_free_the_second_time(fitted, home):
    folder, _, store = home
    args = ("--preset", "reference", "--store", store.digest[:8], "--stores", folder / "stores", "--runs", folder / "runs")
    result = run(trainer_main, "fit", *args, *FLAGS)
    assert result.exit_code == 0 and result.stdout == fitted[0]["runs"][0]["digest"] + "\n"
    assert "already trained" in result.stderr and "median coherence" in result.stderr and "honest" in result.stderr
    info = json.loads(run(trainer_main, "info", result.stdout.strip(), "--runs", folder / "runs", "--json").stdout)
    assert info["arch"] == "signed_topk" and info["finished"] and info["config"]["options"] == [["study", True]]
    assert info["metrics"]["dead_fraction"] == fitted[0]["reference"]["dead"] / N
    other = run(trainer_main, "evaluate", result.stdout.strip(), "--runs", folder / "runs", "--stores", folder / "stores")
    assert other.exit_code == 2 and "held out no rows" in other.stderr  # never rows it was trained on


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--normalize", "median"), "fixes --normalize"),
        (("--epochs", "1.5"), "whole epochs"),
        (("--seed", "1,2"), "trains one SAE"),
        (("--k", "301"), "at most n_latents"),
        (("--kernel", "fast"), "on the CPU"),
    ],
)
def test_what_the_study_does_not_have_is_refused(home, tmp_path, more, message):
    folder, _, store = home
    args = ("--preset", "reference", "--store", store.digest, "--stores", folder / "stores", "--runs", tmp_path)
    result = run(trainer_main, "fit", *args, *(f for f in FLAGS if f.split("=")[0] not in more), *more)
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_other_rows_are_refused_and_so_is_its_option_in_another_training(toy_session_store, tmp_path):
    stores = toy_session_store.path.parent
    result = run(trainer_main, "fit", "--preset", "reference", "--store", toy_session_store.digest, "--stores", stores)
    assert result.exit_code == 2 and "actstore capture --preset reference" in result.stderr
    from actstore.errors import UsageError

    with pytest.raises(UsageError, match="preset reference"):
        fit(toy_session_store, FitConfig(arch=("signed_topk",), n_latents=(32,), k=(2,), option={"study": True}), tmp_path)


def test_interrupted_it_leaves_no_finished_run_and_begins_again(home, fitted, tmp_path):
    store = home[2]
    with pytest.raises(StopRequestError):
        fit_study(store, GIVEN, tmp_path, stop_after(4))
    made, repeated = fit_study(store, GIVEN, tmp_path)
    assert not repeated and made.digest == fitted[0]["runs"][0]["digest"]
    assert made.result == fitted[0]["runs"][0]["metrics"]


def test_without_further_documents_there_is_nothing_honest_to_say(home, tmp_path):
    folder, _, _ = home
    result = run(
        actstore_main, "capture", "--preset", "reference", "--model", TINY, "--hook", "blocks.2.hook_resid_pre", "--corpus",
        folder / "corpus.jsonl", "--seq-len", SEQ_LEN, "--pad-together", 4, "--max-documents", 4, "--stores", tmp_path,
    )  # fmt: skip
    result = run(
        trainer_main, "fit", "--preset", "reference", "--store", result.stdout.strip(), "--stores", tmp_path, "--runs", tmp_path,
        "--n-latents", 64, "--k", 4, "--epochs", 1,
    )  # fmt: skip
    assert result.exit_code == 0 and "no documents but the study's" in result.stderr, result.stderr
