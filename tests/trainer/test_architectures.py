"""What every architecture must do: the plain formula, shapes of every kind of SAE, resume, known atoms, large rates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import StopRequestError, stop_after, words, write_jsonl
from safetensors.torch import load_file

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import UsageError
from trainer import FitConfig, find_run, fit, load_sae
from trainer.architectures import architecture_names, chosen_options, full_name, load_architecture, options_of
from trainer.checkpoint import Run, run_sources
from trainer.config import recipe_lr, resolve
from trainer.evaluate import evaluate
from trainer.initialize import geometric_median, initialize_
from trainer.kernels import cpu, reference
from trainer.losses import annealed_k
from trainer.member import Scaling, open_member, train_step
from trainer.normalize import Normalization, fold_
from trainer.optimize import DeadLatents
from trainer.resample import resample_
from trainer.sae import Batch, Step, Widths
from trainer.sources import aligned

ARCHS = architecture_names()
KINDS = {
    "autoencoder": Widths((12,)),
    "crosscoder": Widths((12, 7)),
    "transcoder": Widths((12,), (9,)),
}


def make(arch, widths=KINDS["autoencoder"], n=40, k=5, dtype=torch.float64, **fields):
    options = fields.pop("options", {})
    config = FitConfig(arch=(arch,), n_latents=(n,), k=(k,), rows=1000, batch_size=10, option=options, **fields)
    (config,) = resolve(config, widths.d_in, 1000, chosen_options(config))
    sae = load_architecture(arch)(config, widths).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        for name, buffer in sae.named_buffers():
            if name == "b_in":
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=dtype))
        if hasattr(sae, "log_threshold"):
            sae.log_threshold.sub_(1)
    return sae


def batch_of(widths, rows=30, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, widths.d_in, generator=generator, dtype=dtype)
    return Batch(x, x if widths.targets is None else torch.randn(rows, widths.d_out, generator=generator, dtype=dtype))


def plain_loss(sae, batch, kernel_step):
    """The loss of each architecture as its paper writes it: dense, one formula after another; no code of ours."""
    c, (x, y), B = sae.config, batch, len(batch.x)
    pre = (x - sae.centre) @ sae.W_enc.T + sae.b_enc
    norms = sum(p.norm(dim=1) for p in sae.W_dec.split(list(sae.widths.parts), dim=1))
    skip = (x - sae.centre) @ sae.W_skip.T if c.skip else 0

    def error(z, W=sae.W_dec, b=sae.b_dec, skip=skip):
        return (y - z @ W - b - skip).square().sum() / (B * kernel_step.variance)

    weight = float(sae.weight) if hasattr(sae, "weight") else 0.0
    if c.arch == "topk":
        return error(torch.zeros_like(pre).scatter(1, pre.topk(c.k).indices, 1.0) * pre.relu())
    if c.arch == "signed_topk":
        return error(torch.zeros_like(pre).scatter(1, pre.topk(c.k).indices, 1.0) * pre)
    if c.arch in ("batchtopk", "matryoshka_batchtopk"):
        z = pre.relu() * (pre.relu() >= pre.relu().flatten().topk(c.k * B).values[-1])
        if c.arch == "batchtopk":
            return error(z)
        sizes = sorted({max(1, round(share * c.n_latents)) for share in (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)})
        return sum(error(z * (torch.arange(c.n_latents) < m)) for m in sizes) / len(sizes)
    if c.arch == "relu_l1":
        return error(pre.relu()) + weight * (pre.relu() * norms).sum() / B
    if c.arch == "p_anneal":
        p = 1 - 0.8 * int((kernel_step.progress - 0.25) / 0.75 * 21) / 20
        return error(pre.relu()) + weight * pre[pre > 0].pow(p).sum() / B
    if c.arch == "gated":
        z = (pre > 0) * (sae.r_mag.exp() * ((x - sae.centre) @ sae.W_enc.T) + sae.b_mag).relu()
        frozen = error(pre.relu(), sae.W_dec.detach(), sae.b_dec.detach(), skip.detach() if c.skip else 0)
        return error(z) + frozen + weight * pre.relu().sum() / B
    if c.arch == "jumprelu":  # the value; its gradient is no derivative, see the test below
        active = pre > sae.log_threshold.exp()
        return error(pre * active) + (active.sum().double() / B / c.k - 1) ** 2
    return error(sae.select(pre).dense(c.n_latents))  # a new one: the loss of its code alone; one with a penalty is written here


@pytest.mark.parametrize("kind", [*KINDS, "skip"])
@pytest.mark.parametrize("arch", ARCHS)
def test_loss_and_gradients_are_those_of_the_plain_formula(arch, kind):
    widths = KINDS["transcoder" if kind == "skip" else kind]
    sae, batch = make(arch, widths, skip=kind == "skip"), batch_of(widths)
    step = Step(0.6, torch.zeros(40, dtype=torch.bool), 1.7, cpu, 60)
    expected = plain_loss(sae, batch, step)
    loss = sae.losses(batch, step).total
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    if arch == "jumprelu":
        return
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in sae.named_parameters()}
    for parameter in sae.parameters():
        parameter.grad = None
    loss.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
        assert parameter.grad.abs().sum() > 0, f"no gradient reaches {name}"


def test_the_gradients_of_jumprelu_are_the_papers_estimators():
    """Equations 11 and 12: with g the gradient of the reconstruction, each pair within ε/2 of its threshold counts."""
    sae, batch, width = make("jumprelu", options={"bandwidth": 0.5, "sparsity": 0.3}), batch_of(KINDS["autoencoder"]), 0.5
    step = Step(0.6, torch.zeros(40, dtype=torch.bool), 1.7, cpu, 60)
    sae.losses(batch, step).total.backward()
    with torch.no_grad():
        pre, threshold = sae.pre_activations(batch.x), sae.log_threshold.exp()
        active = (pre > threshold).double()
        g = -2 * (batch.y - (pre * active) @ sae.W_dec - sae.b_dec) @ sae.W_dec.T / (30 * 1.7)
        near = ((pre - threshold).abs() < width / 2).double() * (pre > 0) / width
        of_threshold = -(near * (threshold * g + 0.3 / 30)).sum(0)
        torch.testing.assert_close(sae.log_threshold.grad, of_threshold * threshold, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sae.W_enc.grad, (g * active).T @ (batch.x - sae.b_dec), rtol=1e-9, atol=1e-12)
    assert near.sum() > 20 and sae.log_threshold.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_shapes(arch, kind):
    widths = KINDS[kind]
    sae, batch = make(arch, widths), batch_of(widths)
    codes = sae.encode(batch.x)
    assert codes.shape == (30, 40) and sae.decode(codes).shape == batch.y.shape and (arch == "signed_topk" or (codes >= 0).all())
    torch.testing.assert_close(sae.decode_sparse(sae.encode_sparse(batch.x)), sae.decode(codes))
    losses = sae.losses(batch, Step(0.5, torch.ones(40, dtype=torch.bool), 1.0, reference, 5))
    assert losses.total.shape == losses.auxiliary.shape == () and losses.auxiliary > 0 and losses.code.batch == 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("normalize", ["number", "dimensions"])
def test_a_folded_sae_is_the_same_on_rows_as_they_are(arch, kind, normalize):
    widths = KINDS[kind]
    sae, batch = make(arch, widths), batch_of(widths)
    sae.constrain_(reference)
    if sae.by_threshold and "threshold" in dict(sae.named_buffers()):
        sae.threshold.fill_(0.7)
    generator, normals = torch.Generator().manual_seed(9), []
    for d in (widths.d_in, widths.d_out):
        spread = torch.rand(d, generator=generator, dtype=torch.float64) + 0.5
        number = torch.full((d,), 0.01 * (d if kind == "transcoder" else 3), dtype=torch.float64)
        normals.append(Normalization(number, 0 * number) if normalize == "number" else Normalization(spread, 3 * spread))
    if widths.targets is None:
        normals[1] = normals[0]
    codes, y = sae.encode(batch.x), sae.decode(sae.encode(batch.x))
    fold_(sae, *normals)
    raw = batch.x / normals[0].scale + normals[0].shift
    found = sae.encode(raw)
    assert torch.equal(found > 1e-12, codes > 1e-12)
    torch.testing.assert_close(sae.decode(found), y / normals[1].scale + normals[1].shift, rtol=1e-9, atol=1e-9)
    if sae.by_threshold and len(widths.parts) == 1:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))


def two_stores(folder):
    corpus = write_jsonl(folder / "corpus.jsonl", words(40, 50))
    hooks = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")
    request = CaptureRequest(model="toy:32", hooks=hooks, corpus=(corpus,), seq_len=64, backend="toy", stores=folder / "stores")
    return [open_store(digest, request.stores) for digest in capture(request)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return two_stores(tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_goes_on_bit_for_bit_from_any_step_and_loads_equal(kind, stores, tmp_path):
    sources = {"autoencoder": aligned(stores[:1]), "crosscoder": aligned(stores), "transcoder": aligned(stores[:1], stores[1:])}[
        kind
    ]
    config = FitConfig(
        arch=tuple(ARCHS), n_latents=(64,), k=(4,), batch_size=128, rows=128 * 24, dead_after_rows=500, dead="resample",
        skip=kind == "transcoder", normalize="dimension" if kind == "crosscoder" else "median",
    )  # fmt: skip
    whole = fit(sources, config, tmp_path / "whole")
    for after in (2, 13):
        with pytest.raises(StopRequestError):
            fit(sources, config, tmp_path / "parts", progress=stop_after(after))
    fit(sources, config, tmp_path / "parts")
    for result in whole:
        a, b = (find_run(result.digest, tmp_path / name) for name in ("whole", "parts"))
        for name in ("sae.safetensors", "metrics.jsonl", "result.json", "config.json"):
            assert (a.path / name).read_bytes() == (b.path / name).read_bytes(), (a.config.arch, name)
        sae = load_sae(a.path)
        saved = load_file(a.path / "sae.safetensors")
        assert all(torch.equal(tensor, saved[name]) for name, tensor in sae.state_dict().items()) and sae.widths == sources.widths
        again = run_sources(a, {s.digest: s for s in stores}.__getitem__)
        numbers = evaluate(a, again)
        assert numbers["fvu"] == pytest.approx(result.metrics["held_out"]["fvu"], rel=1e-6) and numbers["fvu"] < 1.5


@pytest.mark.parametrize("rows", [None, 500])
def test_stores_of_other_text_are_not_row_aligned(rows, stores, tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", words(40, 50)[::-1])
    other = CaptureRequest(
        model="toy:32", hooks=("blocks.0.hook_resid_pre",), corpus=(corpus,), seq_len=64, backend="toy",
        stores=tmp_path / "stores", rows=rows or stores[0].rows,
    )  # fmt: skip
    store = open_store(capture(other)[0], tmp_path / "stores")
    with pytest.raises(UsageError, match="not of the same text: " + (r"\d+ and 500 rows" if rows else r"row \d+ has other")):
        aligned([stores[0], store])
    with pytest.raises(UsageError, match="needs a target store"):
        fit(stores[0], FitConfig(skip=True), tmp_path / "runs")


def rows_from(atoms, n, active, generator):
    """Rows that are sums of a few of the atoms."""
    which = torch.rand(n, len(atoms), generator=generator).topk(active).indices
    return ((0.5 + torch.rand(n, active, 1, generator=generator)) * atoms[which]).sum(1) / math.sqrt(active)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_known_atoms_are_found_and_three_times_the_default_rate_stays_finite(arch, times, tmp_path):
    """Steps on rows made of 96 known directions: the loss falls, all numbers stay finite, the atoms are recovered."""
    d, n, active, batch = 64, 128, 3, 256
    steps = 600 if times == 1 else 300
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(96, d, generator=generator))
    config = FitConfig(
        arch=(arch,),
        n_latents=(n,),
        k=(active,),
        rows=steps * batch,
        batch_size=batch,
        lr=(times * recipe_lr(n, steps),),
        seed=(1,),
    )
    (config,) = resolve(config, d, steps * batch)
    sample = rows_from(atoms, 2048, active, generator)
    centre = geometric_median(sample)
    variance = float((sample - centre).square().sum(1).median())
    normal = Normalization(torch.ones(d), torch.zeros(d))
    run = Run(tmp_path, config, "", "", d, {}, "", (), None)
    member = open_member(run, Scaling((normal,), 1, Batch(sample, sample), centre, None, variance), torch.device("cpu"), "auto")
    losses = []
    for _ in range(steps):
        x = rows_from(atoms, batch, active, generator)
        train_step(member, Batch(x, x), float((x - centre).square().sum()))
        losses.append(member.latest.get("fvu", math.inf))
    assert all(torch.isfinite(t).all() for t in member.sae.state_dict().values())
    assert losses[-1] < losses[10]
    if times > 1:
        return
    assert losses[-1] < 0.5 * losses[10] and 0.8 * active < member.latest["l0"] < 1.2 * active
    found = (atoms @ F.normalize(member.sae.W_dec.detach()).T).amax(1)
    assert found.mean() >= 0.95, found.mean()
    assert (atoms @ F.normalize(torch.randn(n, d, generator=generator)).T).amax(1).mean() < 0.5  # control: chance


def test_options_belong_to_an_architecture_and_only_what_was_changed_is_kept():
    config = FitConfig(arch=("topk", "jumprelu"), option={"bandwidth": 0.01, "multi_topk": False, "penalty": "tanh"})
    assert chosen_options(config) == {"topk": (), "jumprelu": (("bandwidth", 0.01), ("penalty", "tanh"))}
    for wrong in ({"bandwith": 0.1}, {"bandwidth": -1.0}, {"penalty": "l3"}, {"bandwidth": "wide"}):
        with pytest.raises(UsageError) as caught:
            chosen_options(FitConfig(arch=("jumprelu",), option=wrong))
        assert "bandwi" in str(caught.value) or "penalty" in str(caught.value)
    assert "k_annealing" in options_of("batchtopk")


def test_k_falls_to_its_value():
    sae, dead = make("topk", k=2), torch.zeros(40, dtype=torch.bool)
    steps = [Step(p, dead, 1.0, reference) for p in (0.0, 0.05, 0.1, 0.5)]
    assert [annealed_k(sae, 0.1, s) for s in steps] == [12, 7, 2, 2] and annealed_k(sae, 0.0, steps[0]) == 2


def test_multi_topk_adds_an_eighth_of_the_loss_of_four_times_as_many():
    sae, batch = make("topk", k=3, options={"multi_topk": True}), batch_of(KINDS["autoencoder"])
    wide, step = make("topk", k=12), Step(0.5, torch.zeros(40, dtype=torch.bool), 1.0, cpu)
    losses, more = sae.losses(batch, step), wide.losses(batch, step)
    assert losses.total.item() == pytest.approx(losses.reconstruction.item() + more.reconstruction.item() / 8)
    assert losses.code.values.shape == (90,) and torch.equal(losses.code.dense(40), sae.encode(batch.x))


def test_random_prefixes_end_with_the_whole_and_follow_seed_and_step():
    sae, dead = make("matryoshka_batchtopk", n=1000, options={"prefixes": "random"}), torch.zeros(1000, dtype=torch.bool)
    drawn = [tuple(sae.prefixes(Step(0.0, dead, 1.0, cpu, number))) for number in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1] and all(d[-1] == 1000 and list(d) == sorted(set(d)) for d in drawn)


def test_names_as_papers_spell_them_and_kinds_that_follow_from_the_stores():
    assert [full_name(name) for name in ("relu-l1", "p-anneal", "Matryoshka-BatchTopK", "topk")] == [
        "relu_l1", "p_anneal", "matryoshka_batchtopk", "topk",
    ]  # fmt: skip
    for wrong in ("", "to-pk", "transcoder"):
        with pytest.raises(UsageError) as error:
            full_name(wrong)
        assert ("--target-store" in str(error.value)) == (wrong == "transcoder")


def test_dead_latents_are_begun_anew_on_badly_reconstructed_rows():
    sae = make("topk", dtype=torch.float32)
    initialize_(sae, torch.zeros(12))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    batch = batch_of(KINDS["autoencoder"], dtype=torch.float32)
    sae.losses(batch, Step(0.5, torch.zeros(40, dtype=torch.bool), 1.0, reference)).total.backward()
    optimizer.step()
    with torch.no_grad():
        sae.b_enc.fill_(0.1)

    dead = DeadLatents(sae.config, torch.device("cpu"))
    dead.since[:7] = 1000

    before, alive = sae.W_enc.clone(), sae.W_enc[7:].detach().norm(dim=1).mean()
    batch.x[4] *= 50  # by far the worst row
    assert resample_(sae, optimizer, dead, batch) == 7
    assert torch.equal(sae.W_enc[7:], before[7:]) and sae.b_enc[:7].abs().sum() == 0 and (sae.b_enc[7:] == 0.1).all()
    torch.testing.assert_close(sae.W_enc[:7].norm(dim=1), (0.2 * alive).expand(7))
    torch.testing.assert_close(sae.W_dec[:7].norm(dim=1), torch.ones(7))
    assert (F.cosine_similarity(sae.W_enc[:7], batch.x[4:5] - sae.b_dec) > 0.99).all()
    assert optimizer.state[sae.W_enc]["exp_avg"][:7].abs().sum() == 0 < optimizer.state[sae.W_enc]["exp_avg"][7:].abs().sum()
    assert dead.since[:7].sum() == 0


@pytest.mark.parametrize("kernel", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_gives_the_code_that_select_gives(arch, kernel):
    sae, batch = make(arch), batch_of(KINDS["autoencoder"], rows=50)
    with torch.no_grad():
        found, plain = sae.encode_by(kernel, batch.x), sae.encode_sparse(batch.x)
    assert found.batch == 50 and plain.values.any()
    torch.testing.assert_close(found.dense(40), plain.dense(40), rtol=1e-12, atol=1e-12)
