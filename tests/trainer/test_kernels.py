"""Every kernel equals plain autograd in float64: odd shapes, ties, zero rows, k = n, duplicate rows, dead latents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer import kernels
from trainer.architectures import architecture_names, load_architecture
from trainer.config import FitConfig, resolve
from trainer.kernels import cpu, reference, sparse
from trainer.kernels.certified_bound import error_bound
from trainer.kernels.gradients import recycle
from trainer.losses import aux_rows
from trainer.sae import Batch, Step, Widths

FAST = [sparse, cpu]
# d_in, n_latents, k, batch: small ones are scanned, the large one has group maxima; nothing is a multiple of anything
SHAPES = [(16, 64, 4, 32), (13, 50, 7, 33), (8, 8, 8, 5), (5, 40, 1, 1), (37, 2051, 33, 130), (20, 5003, 130, 7)]


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rows_of(batch, d):
    """Rows of every kind: a zero row, two equal ones, a massive one, taken with a stride from a wider matrix."""
    x = random(batch, 2 * d)[:, ::2]
    x[0] *= batch == 1
    if batch > 3:
        x[1] = x[2]
        x[3] *= 1000
    assert not x.is_contiguous() or d == 1
    return x


def parameters(d_in, n, d_out=None, dtype=torch.float64):
    """W_enc, b_enc, b_dec of the rows, W_dec, b_dec of the target; two encoder rows are equal, so that scores tie."""
    d_out = d_out or d_in
    shapes = [(n, d_in), (n,), (d_in,), (n, d_out), (d_out,)]
    made = [0.3 * random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    made[0][1], made[1][1] = made[0][0], made[1][0]
    made[1][: n // 8] -= 100  # never active
    return [p.requires_grad_() for p in made]


def outcome(kernel, encode, x, target, weights):
    """Loss, dense code and gradients of an encoder and the squared error, through one kernel."""
    W_enc, b_enc, b_in, W_dec, b_out = weights
    recycle(weights)
    code = encode(kernel, x, W_enc, b_enc, b_in)
    error, residual = kernel.squared_error(target, code, W_dec, b_out)
    (error + 0.01 * (code.values**3).sum()).backward()  # the code is used elsewhere too, as a sparsity loss would
    return error.detach(), residual, code.dense(len(W_enc)).detach(), [p.grad.clone() for p in weights]


def agree(kernel, encode, x, target, weights, rtol=1e-9):
    expected, got = outcome(reference, encode, x, target, weights), outcome(kernel, encode, x, target, weights)
    for of_reference, of_kernel in zip((*expected[:3], *expected[3]), (*got[:3], *got[3]), strict=True):
        scale = of_reference.abs().max().item()
        assert scale > 0 or len(x) == 1  # of which nothing may be over a threshold
        torch.testing.assert_close(of_kernel, of_reference, rtol=rtol, atol=rtol * scale)
    return expected


def untied(W_enc, b_enc):
    with torch.no_grad():
        W_enc[1] += 0.1 * random(W_enc.shape[1], seed=9)


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_agrees(kernel, shape):
    d, n, k, batch = shape
    weights = parameters(d, n)
    untied(*weights[:2])  # which of two equal scores is taken, the kernel may choose: see the test of ties
    _, _, dense, _ = agree(kernel, lambda m, *a: m.encode_topk(*a, k), rows_of(batch, d), rows_of(batch, d), weights)
    assert ((dense != 0).sum(1) <= k).all() and (dense >= 0).all()


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("guess", [0.0, 0.4, 1e9])
def test_batchtopk_agrees_whatever_was_guessed(kernel, shape, guess):
    d, n, k, batch = shape
    weights = parameters(d, n)
    untied(*weights[:2])
    x = rows_of(batch, d)
    if batch > 3:
        x[2] += 0.01  # equal rows tie too
    _, _, dense, _ = agree(kernel, lambda m, *a: m.encode_batchtopk(*a, k * batch, guess), x, rows_of(batch, d), weights)
    assert (dense != 0).sum() <= k * batch and (dense >= 0).all()


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_thresholds_agree_also_where_nothing_or_everything_is_over_them(kernel, shape):
    d, n, _, batch = shape
    for threshold in (random(n, seed=7).abs(), torch.full((n,), -1e6).double(), torch.full((n,), 1.0).double()):
        agree(kernel, lambda m, *a, t=threshold: m.encode_over(*a, t), rows_of(batch, d), rows_of(batch, d), parameters(d, n))
    empty = kernel.encode_over(rows_of(batch, d), *parameters(d, n)[:3], torch.full((n,), 1e9).double())
    assert len(empty.indices) == 0 and empty.offsets.tolist() == [0] * (batch + 1)


@pytest.mark.parametrize("kernel", FAST)
def test_transcoders_and_crosscoders_have_another_width_on_each_side_and_may_have_no_b_dec(kernel):
    """Rows of one width, targets of another; a crosscoder's rows are its layers' side by side."""
    for d_in, d_out in ((17, 5), (5, 48)):
        weights = parameters(d_in, 60, d_out)
        untied(*weights[:2])
        x, target = rows_of(21, d_in), rows_of(21, d_out)
        agree(kernel, lambda m, *a: m.encode_topk(*a, 6), x, target, weights)
    code = kernel.encode_topk(x, weights[0], weights[1], None, 6)
    expected = reference.encode_topk(x, weights[0], weights[1], None, 6)
    torch.testing.assert_close(code.dense(60), expected.dense(60))


@pytest.mark.parametrize("kernel", FAST)
def test_matryoshka_prefixes_share_one_code(kernel):
    """The sum of the errors of nested prefixes: pairs beyond a prefix count as 0 there, and gradients add up."""
    weights = parameters(11, 64)
    untied(*weights[:2])
    x = rows_of(40, 11)

    def total(module):
        recycle(weights)
        W_enc, b_enc, b_in, W_dec, b_out = weights
        code = module.encode_batchtopk(x, W_enc, b_enc, b_in, 200)
        prefixes = [code._replace(values=code.values * (code.indices < p)) for p in (8, 24, 64)]
        error = sum(module.squared_error(x, prefix, W_dec, b_out)[0] for prefix in prefixes)
        error.backward()
        return [error.detach(), *(p.grad.clone() for p in weights)]

    for expected, got in zip(total(reference), total(kernel), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("n_dead, k", [(1, 4), (9, 4), (30, 64)])
def test_auxk_agrees_and_touches_dead_latents_only(kernel, n_dead, k):
    x, target = rows_of(25, 12), random(25, 12, seed=5)
    dead = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:n_dead].sort().values

    def gradients(module):
        weights = parameters(12, 40)
        with torch.no_grad():
            weights[1].zero_()
        untied(*weights[:2])
        error = module.dead_squared_error(x, target, weights[0], weights[1], weights[3], dead, k)
        error.backward()
        return error.detach(), *(weights[i].grad for i in (0, 1, 3))

    for expected, got in zip(gradients(reference), gradients(kernel), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().sum() > 0
    alive = torch.ones(40, dtype=torch.bool).index_fill_(0, dead, False)
    assert all((g[alive] == 0).all() for g in gradients(kernel)[1:])


@pytest.mark.parametrize("kernel", FAST)
def test_of_equal_scores_any_is_taken_but_never_both(kernel):
    x = torch.ones(4, 6).double()
    W_enc, b_enc = torch.ones(50, 6).double(), torch.zeros(50).double()
    code = kernel.encode_topk(x, W_enc, b_enc, None, 7)
    assert ((code.dense(50) == 6).sum(1) == 7).all()
    batch = kernel.encode_batchtopk(x, W_enc, b_enc, None, 10)
    assert len(batch.indices) == 10 and batch.offsets.tolist() == [0, 10, 10, 10, 10]
    assert len(kernel.encode_batchtopk(-x, W_enc, b_enc, None, 10).indices) == 0


@pytest.mark.parametrize("kernel", FAST)
def test_decoder_rows(kernel):
    rows, gradient = F.normalize(random(70, 9)), random(70, 9, seed=2)
    expected, got = gradient.clone(), gradient.clone()
    assert kernel.project_rows_(got, rows) == pytest.approx(reference.project_rows_(expected, rows), rel=1e-12)
    torch.testing.assert_close(got, expected)
    assert (got * rows).sum(1).abs().max() < 1e-12
    scaled = 5 * rows
    scaled[3] = 0
    kernel.normalize_rows_(scaled)
    torch.testing.assert_close(scaled, rows.clone().index_fill_(0, torch.tensor([3]), 0.0))


@pytest.mark.parametrize("arch", architecture_names())
@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("n_dead", [0, 3, 40])
def test_losses_and_gradients_of_every_architecture_agree(arch, kernel, n_dead):
    sae, x = make(arch, 13, 50, 7), rows_of(33, 13)
    dead = torch.zeros(50, dtype=torch.bool)
    dead[:n_dead] = True
    expected, of_reference = gradients(sae, x, dead, reference)
    got, of_kernel = gradients(sae, x, dead, kernel)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    for name, gradient in of_reference.items():
        torch.testing.assert_close(of_kernel[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.abs().sum() > 0, f"no gradient reaches {name}"


def make(arch, d, n, k, dtype=torch.float64):
    (config,) = resolve(FitConfig(arch=(arch,), n_latents=(n,), k=(k,)), d, 1000)
    sae = load_architecture(arch)(config, Widths((d,))).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(0.3 * random(*parameter.shape, seed=i))
        if arch == "jumprelu":  # wide enough that pairs lie near their thresholds
            sae.log_threshold.sub_(1)
            sae.options = type(sae.options)(bandwidth=0.3)
    return sae


def gradients(sae, x, dead, kernel):
    recycle(sae.parameters())
    losses = sae.losses(Batch(x, x), Step(0.3, dead, 1.7, kernel, 3))
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_certified_candidates_give_the_float32_set(outlier):
    """Real-looking scores, with and without outlier dimensions: every row's set is the float32 one, few are left over."""
    d, n, k, batch = 96, 4096, 32, 300
    W = F.normalize(random(n, d, dtype=torch.float32))
    active = (torch.rand(batch, n, generator=torch.Generator().manual_seed(4)) < 40 / n).float()
    x = active @ W + 0.05 * random(batch, d, seed=6, dtype=torch.float32)
    x[:, :2] *= outlier
    b = 0.01 * random(n, seed=8, dtype=torch.float32)
    indices, values = torch.empty(batch, k, dtype=torch.int64), torch.empty(batch, k)
    left = cpu._certified_topk(x, W, b, k, indices, values)
    exact = (x.double() @ W.double().T + b.double()).float()
    expected = exact.topk(k, dim=1).values.relu()
    torch.testing.assert_close(values.sort(dim=1, descending=True).values, expected, rtol=1e-5, atol=1e-5 * outlier)
    wanted = torch.zeros(batch, n, dtype=torch.bool).scatter_(1, exact.topk(k, dim=1).indices, True)
    got = torch.zeros(batch, n, dtype=torch.bool).scatter_(1, indices, True)
    differ = (wanted != got) & (exact - expected[:, -1:]).abs().gt(1e-5 * outlier)  # float32 itself cannot tell nearer ones
    assert not differ.any() and left < batch // 4


def test_control_without_the_slack_the_candidates_lack_some():
    """What the certificate is for: taking the k best bfloat16 scores alone gives another set."""
    d, n, k, batch = 96, 4096, 32, 300
    x, W = random(batch, d, dtype=torch.float32), random(n, d, seed=2, dtype=torch.float32)
    exact = (x @ W.T).topk(k, dim=1).indices.sort(dim=1).values
    rough = (x.bfloat16() @ W.bfloat16().T).float().topk(k, dim=1).indices.sort(dim=1).values
    assert (exact != rough).any(dim=1).float().mean() > 0.1


def test_rows_that_cannot_be_certified_are_computed_in_float32():
    """Weights whose rounding error drowns every difference: all rows are left over, and right."""
    d, n, k = 64, 700, 8
    x, W = random(50, d, dtype=torch.float32), random(n, d, seed=2, dtype=torch.float32)
    W[5] *= 1e6  # its rounding error is the bound of all
    indices, values = torch.empty(50, k, dtype=torch.int64), torch.empty(50, k)
    assert cpu._certified_topk(x, W, torch.zeros(n), k, indices, values) == 50
    expected = (x @ W.T).topk(k, dim=1).values.relu()
    torch.testing.assert_close(values.sort(dim=1, descending=True).values, expected, rtol=1e-5, atol=1e-3)


def test_the_error_bound_holds():
    x, W, b = (random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(64, 200), (500, 200), (500,)]))
    rounded, norms, errors = cpu._round(x, "test rows")
    W_rounded, W_norms, W_errors = cpu._round(W, "test weights")
    assert torch.equal(rounded, x.bfloat16()) and torch.equal(W_rounded, W.bfloat16())
    torch.testing.assert_close(errors, (x - rounded.float()).norm(dim=1))
    most = float(W_errors.max())
    e = error_bound(norms.numpy(), errors.numpy(), float(W_norms.max()) + most, most, float(b.abs().max()), 200)
    scores = F.linear(rounded, W_rounded, b.bfloat16()).double()
    true = x.double() @ W.double().T + b.double()
    excess = (true - scores).abs() - scores.abs() * 2**-7
    assert (excess <= torch.from_numpy(e).double()[:, None]).all()
    assert (excess > 0).any()  # the bound is needed: rounding of the result alone explains less


def test_gradient_memory_is_used_again_and_added_to():
    weights = parameters(9, 30)
    x = rows_of(12, 9)
    seen = []
    for _ in range(3):
        recycle(weights)
        code = cpu.encode_topk(x, *weights[:3], 4)
        error, _ = cpu.squared_error(x, code, weights[3], weights[4])
        error.backward()
        seen.append((weights[3].grad.data_ptr(), weights[3].grad.clone()))
    assert len({pointer for pointer, _ in seen}) == 1 and torch.equal(seen[0][1], seen[2][1])
    error, _ = cpu.squared_error(x, cpu.encode_topk(x, *weights[:3], 4), weights[3], weights[4])
    error.backward()  # without `recycle`: as autograd does, it adds
    torch.testing.assert_close(weights[3].grad, 2 * seen[0][1])


def test_the_same_bits_however_many_threads():
    """All but the dense product: sums of compiled loops do not depend on the number of threads."""
    weights = [p.detach().float().requires_grad_() for p in parameters(24, 700)]
    x = rows_of(64, 24).float().contiguous()
    code = cpu.encode_topk(x, *weights[:3], 9)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            recycle(weights)
            detached = code._replace(values=code.values.detach().requires_grad_())
            error, _ = cpu.squared_error(x, detached, weights[3], weights[4])
            error.backward()
            found.append((error.item(), weights[3].grad.clone(), detached.values.grad.clone()))
    finally:
        torch.set_num_threads(before)
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_a_score_that_is_not_a_number_does_not_hide():
    """Comparisons drop NaN; the loss must not."""
    sae = make("topk", 8, 600, 4, torch.float32)
    x = torch.randn(5, 8)
    x[2, 3] = float("nan")
    for kernel in (reference, *FAST):
        assert not torch.isfinite(sae.losses(Batch(x, x), Step(0.5, torch.zeros(600, dtype=torch.bool), 1.0, kernel)).total)


def test_auxk_is_taken_on_fewer_rows_where_many_latents_are_dead():
    assert [aux_rows(4096, dead, 1600) for dead in (1, 100, 150, 800, 1600)] == [1, 1, 2, 8, 16]
    sae, x = make("topk", 8, 64, 4), random(64, 8)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[:32] = True
    whole = sae.losses(Batch(x, x), Step(0.5, dead, 1.0, reference)).auxiliary
    other = x.clone()
    other[1::8] += 1  # rows between are not looked at
    residual = reference.squared_error(x, reference.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, 4), sae.W_dec, sae.b_dec)[1]
    assert len(residual) == 64 and torch.equal(sae.losses(Batch(other, other), Step(0.5, dead, 1.0, reference)).auxiliary, whole)


def test_the_auxiliary_loss_teaches_dead_latents_only():
    """AuxK adds gradient to dead latents, none to live ones, and nothing when its weight is zero."""
    sae = make("topk", 8, 30, 2)
    x = random(40, 8, seed=2)
    never = torch.ones(30, dtype=torch.bool)
    never[sae.encode_sparse(x).indices.unique()] = False
    assert 0 < never.sum() < 30
    _, without = gradients(sae, x, torch.zeros_like(never), reference)
    losses, with_aux = gradients(sae, x, never, reference)
    assert 0 < losses.auxiliary < 1.5
    changed = (with_aux["W_dec"] != without["W_dec"]).any(dim=1)
    assert changed.any() and not (changed & ~never).any()
    assert torch.equal(with_aux["b_dec"], without["b_dec"])


def test_the_plain_formula_by_hand():
    """One row, two latents, k 1: loss and gradients of Gao et al. 2024, section 2.3, worked out on paper."""
    sae = make("topk", 2, 2, 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        sae.b_enc.zero_(), sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)  # pre (2, 1): latent 0, value 2; x̂ = (1, 2); residual (2, -1)
    for kernel in (reference, *FAST):
        losses, grad = gradients(sae, x, torch.zeros(2, dtype=torch.bool), kernel)
        assert losses.squared_error.item() == 5 and losses.code.indices.item() == 0 and losses.code.values.item() == 2
        # dL/dx̂ = -2 r / 1.7; dz = dL/dx̂ · W_dec[0] = -2 (-1) / 1.7
        g = torch.tensor([-4.0, 2.0], dtype=torch.float64) / 1.7
        torch.testing.assert_close(grad["W_dec"], torch.stack([g * 2, g * 0]))
        torch.testing.assert_close(grad["W_enc"], torch.stack([torch.tensor([2.0, 1.0], dtype=torch.float64) * g[1], g * 0]))
        torch.testing.assert_close(grad["b_dec"], g - torch.tensor([1.0, 0.0], dtype=torch.float64) * g[1])


def test_encode_and_decode_of_an_sae():
    sae = make("topk", 6, 20, 5, torch.float32)
    x = torch.randn(9, 6)
    codes = sae.encode(x)
    assert ((codes != 0).sum(1) <= 5).all() and (codes >= 0).all()
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(codes.max(1).values, pre.max(1).values.relu())
    torch.testing.assert_close(sae.decode(codes), codes @ sae.W_dec + sae.b_dec)


def test_choice_of_kernel():
    on_cpu, mps = torch.device("cpu"), torch.device("mps")
    assert kernels.choose("reference", on_cpu, 1, 1000) is reference
    assert kernels.choose("fast", on_cpu, 999, 1000) is cpu and kernels.choose("fast", mps, 1, 1000) is sparse
    assert kernels.choose("auto", on_cpu, 10, 1000) is cpu and kernels.choose("auto", on_cpu, 101, 1000) is reference
