"""Formats: what is written computes the same by the peer's own formulas, comes back as it was, and a hostile one is refused.

Each `by_*` restates a peer's loader and forward from its source; `benchmarks/interop` runs the real ones.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from helpers import words, write_jsonl
from safetensors.torch import load_file, save_file

from actstore.capture import CaptureRequest, capture
from actstore.catalog import open_store
from actstore.errors import FormatError, StorageFailed, StoreNotFound, UsageError
from trainer import find_run, load_sae
from trainer.architectures import architecture_names
from trainer.checkpoint import create_run, finish_run, new_sae, read_run, run_sources
from trainer.config import FitConfig, resolve
from trainer.evaluate import evaluate
from trainer.formats import delphi, export_run, format_names, import_run, import_sae
from trainer.formats.dictionary_learning import CLASSES
from trainer.hub import model_card, push_run
from trainer.report import write_report
from trainer.sources import aligned

N, K = 48, 4
ARCHS = [arch for arch in architecture_names() if arch in CLASSES]  # no other library has the rest
BY_THRESHOLD = ("batchtopk", "matryoshka_batchtopk", "jumprelu")
HELD = {"format": 1, "rows_seen": 7, "train": {}, "held_out": {}, "dead_fraction": 0.0, "dead_window_rows": 1}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two row-aligned toy stores."""
    folder = tmp_path_factory.mktemp("formats")
    hooks = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")
    corpus = write_jsonl(folder / "corpus.jsonl", words(20, 40))
    request = CaptureRequest(model="toy:32", hooks=hooks, corpus=(corpus,), seq_len=64, backend="toy", stores=folder / "stores")
    return [open_store(digest, request.stores) for digest in capture(request)]


@pytest.fixture
def make(stores, tmp_path):
    """Return a function that makes a finished run of random weights, far from the origin, each latent in its own units."""

    def make(arch, transcoder=False, skip=False, crosscoder=False, one_threshold=True):
        inputs = list(stores) if crosscoder else stores[:1]
        sources = aligned(inputs, stores[1:] if transcoder else None)
        (config,) = resolve(FitConfig(arch=(arch,), n_latents=(N,), k=(K,), skip=skip, seed=(len(arch),)), 32, 1000)
        generator = torch.Generator().manual_seed(5)
        sae = new_sae(config, sources.widths)
        x, y = sources.take(range_of(sources))
        with torch.no_grad():
            for name, tensor in (*sae.named_parameters(), *sae.named_buffers()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
                if name in ("threshold", "log_threshold") and not (one_threshold and name == "threshold"):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator))
                elif name == "threshold":
                    tensor.fill_(0.7)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
            sae.b_dec.copy_(y.mean(0) + 3)
            if transcoder:
                sae.b_in.copy_(x.mean(0) - 2)
        run = create_run(tmp_path / "runs", config, sources)
        finish_run(run, sae, HELD)
        return read_run(run.path), sae.eval(), x

    return make


def range_of(sources):
    return torch.arange(min(sources.rows, 600)).numpy()


def outcome(sae, x):
    with torch.no_grad():
        codes = sae.encode(x)
        return codes, sae.decode(codes, x)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a != 0, b != 0) or a.shape[1] != N  # the same latents are active
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# --- the peers, restated ----------------------------------------------------------------------------------------------


def top(h, k):
    best = h.topk(k, dim=1)
    return torch.zeros_like(h).scatter(1, best.indices, best.values.relu())


def by_saelens(folder, x):
    """sae_lens 6.54.12, saes/{topk,standard,jumprelu,gated}_sae.py and transcoder.py."""
    c, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert w["W_enc"].shape == (c["d_in"], c["d_sae"]) and all(t.dtype == torch.float32 for t in w.values())
    assert c["dtype"] == "float32" and c["normalize_activations"] == c["reshape_activations"] == "none"
    assert c["metadata"]["sae_lens_version"] >= "6.0.0" and c["metadata"]["hook_name"] == "blocks.0.hook_resid_pre"
    a = c["architecture"]
    common = {"W_enc", "W_dec", "b_dec"}
    h = (x - w["b_dec"] if c["apply_b_dec_to_input"] else x) @ w["W_enc"]
    if a == "gated":
        assert set(w) == common | {"b_gate", "b_mag", "r_mag"}
        f = (h + w["b_gate"] > 0) * (h * w["r_mag"].exp() + w["b_mag"]).relu()
    else:
        h = h + w["b_enc"]
        f = top(h, c["k"]) if a == "topk" else h.relu()
        if a.startswith("jumprelu"):
            f = f * (h > w["threshold"])
        more = {"threshold"} if a.startswith("jumprelu") else set()
        assert set(w) == common | {"b_enc"} | more | ({"W_skip"} if "skip" in a else set())
    assert not a.endswith("transcoder") or (not c["apply_b_dec_to_input"] and c["d_out"] == w["W_dec"].shape[1])
    return f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "skip" in a else 0)


def by_dictionary_learning(folder, x):
    """saprmarks/dictionary_learning: dictionary.py, trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py."""
    about = json.loads((folder / "config.json").read_text())["trainer"]
    w, name = torch.load(folder / "ae.pt", weights_only=True), about["dict_class"]
    assert (about["activation_dim"], about["dict_size"]) == (32, N)
    assert all(t.dtype == torch.float32 for key, t in w.items() if key not in ("k", "group_sizes"))
    if "TopK" in name:
        assert w["k"].dtype == torch.int32 and int(w["k"]) == about["k"] and w["threshold"].shape == ()
    if name in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder"):
        assert w["encoder.weight"].shape == (N, 32) and w["decoder.weight"].shape == (32, N)
        enc, dec = w["encoder.weight"].T, w["decoder.weight"].T
    else:
        assert w["W_enc"].shape == (32, N) and w["W_dec"].shape == (N, 32)
        enc, dec = w["W_enc"], w["W_dec"]
    b = w[{"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(name, "b_dec")]
    if name == "JumpReluAutoEncoder":  # from_pretrained leaves apply_b_dec_to_input False
        h = x @ enc + w["b_enc"]
        f = (h * (h > w["threshold"])).relu()
    elif name == "GatedAutoEncoder":
        h = (x - b) @ enc
        f = (h + w["gate_bias"] > 0) * (w["r_mag"].exp() * h + w["mag_bias"]).relu()
    else:
        h = ((x - b) @ enc + w.get("encoder.bias", w.get("b_enc"))).relu()
        f = top(h, about["k"]) if name == "AutoEncoderTopK" else h * (h > w["threshold"]) if "threshold" in w else h
    if name == "MatryoshkaBatchTopKSAE":
        assert w["group_sizes"].dtype == torch.int64 and int(w["group_sizes"].sum()) == N
    if name == "AutoEncoder":  # normalize_decoder does nothing then
        torch.testing.assert_close(dec.norm(dim=1), torch.ones(N))
    return f, f @ dec + b


def by_sparsify(folder, x):
    """eai-sparsify 1.3.3, sparse_coder.py and fused_encoder.py."""
    c, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    assert c["activation"] == "topk" and w["encoder.weight"].shape == w["W_dec"].shape == (c["num_latents"], c["d_in"])
    assert ("W_skip" in w) == c["skip_connection"]
    f = top(((x if c["transcode"] else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu(), c["k"])
    return f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if c["skip_connection"] else 0)


BY = {"saelens": by_saelens, "dictionary_learning": by_dictionary_learning, "sparsify": by_sparsify}
HELD_BY = [
    *(("saelens", arch, False, False) for arch in ARCHS),
    *(("saelens", arch, True, skip) for arch in ("relu_l1", "p_anneal", *BY_THRESHOLD) for skip in (False, True)),
    *(("dictionary_learning", arch, False, False) for arch in ARCHS),
    *(("sparsify", "topk", transcoder, skip) for transcoder, skip in ((False, False), (True, False), (True, True))),
]


@pytest.mark.parametrize(("name", "arch", "transcoder", "skip"), HELD_BY)
def test_an_export_computes_the_same_by_the_peers_formulas_and_comes_back(make, tmp_path, name, arch, transcoder, skip):
    run, sae, x = make(arch, transcoder, skip)
    files = export_run(run, name, tmp_path / "out")
    assert sorted(files) == sorted(p for p in (tmp_path / "out").iterdir())
    expected = outcome(sae, x)
    assert 0 < (expected[0] != 0).float().mean() < 0.9
    close(BY[name](tmp_path / "out", x), expected)
    back = import_sae(tmp_path / "out", name)
    assert back.config.k == K and back.config.n_latents == N and back.config.imported.startswith(f"{name}:")
    assert back.arch == {"p_anneal": "relu_l1"}.get(arch, arch)
    close(outcome(back, x), expected)


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_thresholds_in_units_of_their_own_are_kept(make, tmp_path, name, arch):
    """`--normalize dimension` leaves each latent its own threshold; dictionary_learning's BatchTopKSAE has one for all."""
    run, sae, x = make(arch, one_threshold=False)
    export_run(run, name, tmp_path / "out")
    close(BY[name](tmp_path / "out", x), outcome(sae, x))
    close(outcome(import_sae(tmp_path / "out", name), x), outcome(sae, x))


@pytest.mark.parametrize(
    ("name", "arch", "fields"),
    [
        ("saelens", "topk", {"transcoder": True}),
        ("saelens", "gated", {"transcoder": True}),
        ("saelens", "topk", {"crosscoder": True}),
        ("dictionary_learning", "topk", {"transcoder": True}),
        ("dictionary_learning", "batchtopk", {"crosscoder": True}),
        ("sparsify", "topk", {"crosscoder": True}),
        *(
            (name, arch, {})
            for name in ("saelens", "dictionary_learning")
            for arch in architecture_names()
            if arch not in CLASSES
        ),
        *(("sparsify", arch, {}) for arch in architecture_names() if arch != "topk"),
    ],
)
def test_what_a_format_cannot_say_is_refused(make, tmp_path, name, arch, fields):
    with pytest.raises(UsageError, match="has no form"):
        export_run(make(arch, **fields)[0], name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{}, {"transcoder": True, "skip": True}, {"crosscoder": True}])
def test_our_own_format_is_the_run(make, tmp_path, fields):
    run, sae, x = make("jumprelu", **fields)
    export_run(run, "actstore", tmp_path / "out")
    assert find_run(run.digest, tmp_path / "out").result == run.result
    again = import_run(tmp_path / "out", "actstore", tmp_path / "other")
    assert again.digest == run.digest and again.result == run.result
    assert import_run(tmp_path / "out" / run.digest, "actstore", tmp_path / "other") == again
    assert all(torch.equal(a, b) for a, b in zip(outcome(load_sae(again.path), x), outcome(sae, x), strict=True))


# --- runs made by an import -------------------------------------------------------------------------------------------


def test_an_import_is_a_finished_run(make, stores, tmp_path):
    run, sae, x = make("batchtopk")
    export_run(run, "dictionary_learning", tmp_path / "out")
    sources = run_sources(run, lambda digest: next(s for s in stores if s.digest == digest))
    made = import_run(tmp_path / "out", "dictionary_learning", tmp_path / "runs", sources, holdout=0.2)
    assert made.digest != run.digest and made.store == run.store and made.key == run.key
    assert made.result["rows_seen"] == 0 and made.result["dead_fraction"] is None
    close(outcome(load_sae(made.path), x), outcome(sae, x))
    numbers = evaluate(made, sources)
    assert numbers["held_out"] and numbers["fvu"] == pytest.approx(made.result["held_out"]["fvu"])
    assert numbers["rows"] < sources.rows
    assert import_run(tmp_path / "out", "dictionary_learning", tmp_path / "runs", sources, holdout=0.2) == made  # free
    page = write_report([made, run], lambda run: sources, tmp_path / "r.html", rows=500).read_text()
    assert made.digest[:12] in page
    export_run(made, "saelens", tmp_path / "again")
    close(by_saelens(tmp_path / "again", x), outcome(sae, x))


def test_two_saes_of_one_shape_are_two_runs(make, stores, tmp_path):
    """Their configurations would be equal but for where they come from."""
    run, _, _ = make("topk")
    export_run(run, "sparsify", tmp_path / "a")
    export_run(run, "sparsify", tmp_path / "b")
    weights = load_file(tmp_path / "b" / "sae.safetensors")
    save_file({**weights, "b_dec": weights["b_dec"] + 1}, tmp_path / "b" / "sae.safetensors")
    sources = aligned(stores[:1])
    a, b = (import_run(tmp_path / name, "sparsify", tmp_path / "runs", sources) for name in "ab")
    assert a.digest != b.digest


def test_an_import_needs_a_store_of_its_width(make, stores, tmp_path):
    export_run(make("topk", transcoder=True)[0], "sparsify", tmp_path / "out")
    with pytest.raises(UsageError, match="does not say which rows"):
        import_run(tmp_path / "out", "sparsify", tmp_path / "runs")
    with pytest.raises(UsageError, match="widths 32, the SAE is of 32 to 32"):
        import_run(tmp_path / "out", "sparsify", tmp_path / "runs", aligned(stores[:1]))
    run = import_run(tmp_path / "out", "sparsify", tmp_path / "runs", aligned(stores[:1], stores[1:]))
    assert run.widths.targets == (32,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_read(make, tmp_path, dtype):
    run, sae, _ = make("topk")
    export_run(run, "saelens", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "sae_weights.safetensors")
    save_file({name: t.to(dtype) for name, t in weights.items()}, tmp_path / "out" / "sae_weights.safetensors")
    back = import_sae(tmp_path / "out", "saelens")
    assert back.W_enc.dtype == torch.float32 and torch.equal(back.W_enc, sae.W_enc.to(dtype).float())


def test_saelens_choices_that_ours_have_not_are_folded(make, tmp_path):
    """`apply_b_dec_to_input` false, and top-k by activation times decoder norm (topk_sae.py)."""
    run, _, x = make("topk")
    folder = tmp_path / "out"
    export_run(run, "saelens", folder)
    c, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    norms = torch.rand(N) + 0.5
    w["W_dec"] = w["W_dec"] * norms[:, None]
    save_file(w, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**c, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}))
    f = top((x @ w["W_enc"] + w["b_enc"]) * norms, K)
    close(outcome(import_sae(folder, "saelens"), x), (f, (f / norms) @ w["W_dec"] + w["b_dec"]))
    run, _, x = make("gated")
    export_run(run, "saelens", tmp_path / "gated")
    c, w = json.loads((tmp_path / "gated" / "cfg.json").read_text()), load_file(tmp_path / "gated" / "sae_weights.safetensors")
    (tmp_path / "gated" / "cfg.json").write_text(json.dumps({**c, "apply_b_dec_to_input": False}))
    h = x @ w["W_enc"]
    f = (h + w["b_gate"] > 0) * (h * w["r_mag"].exp() + w["b_mag"]).relu()
    close(outcome(import_sae(tmp_path / "gated", "saelens"), x), (f, f @ w["W_dec"] + w["b_dec"]))


def test_a_threshold_that_was_never_learned_is_relu(make, tmp_path):
    """dictionary_learning leaves -1 in `threshold` for the first thousand steps; activations are over it after ReLU."""
    run, _, x = make("batchtopk")
    export_run(run, "dictionary_learning", tmp_path / "out")
    w = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    torch.save({**w, "threshold": torch.tensor(-1.0)}, tmp_path / "out" / "ae.pt")
    close(outcome(import_sae(tmp_path / "out", "dictionary_learning"), x), by_dictionary_learning(tmp_path / "out", x))


# --- hostile folders --------------------------------------------------------------------------------------------------

FILES = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
}


@pytest.fixture
def folder_of(make, tmp_path):
    def exported(name):
        export_run(make("topk")[0], name, tmp_path / "out")
        return tmp_path / "out"

    return exported


def changed(path, **fields):
    about = json.loads(path.read_text())
    inner = about.get("trainer", about)
    for name, value in fields.items():
        if value is None:
            del inner[name]
        else:
            inner[name] = value
    path.write_text(json.dumps(about))


def refused(folder, name, match="."):
    with pytest.raises(FormatError, match=match) as caught:
        import_sae(folder, name)
    assert caught.value.where.startswith(str(folder)) or caught.value.where in FILES[name]


@pytest.mark.parametrize("name", BY)
def test_files_that_are_missing_links_or_no_files(folder_of, tmp_path, name):
    folder = folder_of(name)
    for file in FILES[name]:
        path = folder / file
        data = path.read_bytes()
        path.unlink()
        refused(folder, name, "has no")
        (tmp_path / "secret").write_bytes(data)
        path.symlink_to(tmp_path / "secret")
        refused(folder, name, "not a regular file")
        path.unlink()
        os.mkfifo(path)
        refused(folder, name, "not a regular file")
        path.unlink()
        with path.open("wb") as sparse:
            sparse.truncate(1 << 40)
        refused(folder, name, "bytes, at most")
        path.write_bytes(b"")
        refused(folder, name)
        path.write_bytes(pickle.dumps({"a": 1}))
        refused(folder, name)
        path.write_bytes(data)
    import_sae(folder, name)


SIZES = {
    "saelens": ("d_in", "d_sae"),
    "dictionary_learning": ("activation_dim", "dict_size"),
    "sparsify": ("d_in", "num_latents"),
}


@pytest.mark.parametrize("name", BY)
def test_configs_that_do_not_fit(folder_of, name):
    folder = folder_of(name)
    path = folder / FILES[name][0]
    good = path.read_text()
    for field in SIZES[name]:
        for value in (31, 10**7, 1 << 62, -1, "32", 32.5, True, [32], {}):
            changed(path, **{field: value})
            refused(folder, name)
            path.write_text(good)
    for field in (*SIZES[name], "k"):
        if (name, field) != ("sparsify", "num_latents"):  # it has a default, which is another size
            changed(path, **{field: None})
            refused(folder, name, "required|is 4 in ae.pt and None")
        path.write_text(good)
    for value in (0, -1, N + 1, 1 << 40, "4", 2.5):
        changed(path, k=value)
        refused(folder, name)
        path.write_text(good)
    for text in ("[" * 100_000, "[]", "null", good[:-1], good.replace("{", '{"k":4,"k":4,', 1), "{}", '{"k": NaN}'):
        path.write_text(text)
        refused(folder, name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("saelens", {"architecture": "batchtopk"}), ("saelens", {"architecture": "../../x"}), ("saelens", {"metadata": None}),
        ("saelens", {"metadata": {"sae_lens_version": "5.9.0"}}), ("saelens", {"normalize_activations": "layer_norm"}),
        ("saelens", {"normalize_activations": "expected_average_only_in"}), ("saelens", {"reshape_activations": "hook_z"}),
        ("saelens", {"architecture": "jumprelu"}), ("saelens", {"architecture": "transcoder"}),
        ("saelens", {"architecture": "skip_transcoder", "d_out": 1 << 20}),
        ("dictionary_learning", {"dict_class": "os.system"}), ("dictionary_learning", {"dict_class": "AutoEncoder"}),
        ("dictionary_learning", {"dict_class": None}), ("dictionary_learning", {"k": 5}),
        ("sparsify", {"activation": "groupmax"}), ("sparsify", {"signed": True}), ("sparsify", {"skip_connection": True}),
        ("sparsify", {"num_latents": 0, "expansion_factor": 1 << 24}), ("sparsify", {"num_latents": 0}),
        ("sparsify", {"skip_connection": True, "transcode": True}),
    ],
)  # fmt: skip
def test_configs_of_other_saes(folder_of, name, fields):
    folder = folder_of(name)
    changed(folder / FILES[name][0], **fields)
    refused(folder, name)


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
def test_safetensors_that_do_not_fit(folder_of, name):
    folder = folder_of(name)
    path = folder / FILES[name][1]
    good = load_file(path)
    first = next(iter(good))
    for bad in (
        {**good, "more": torch.zeros(1)}, {k: t for k, t in good.items() if k != first},
        {**good, first: good[first].T.contiguous()},
        {**good, first: good[first].int()}, {**good, first: good[first] * float("nan")}, {**good, first: good[first][:1].clone()},
        {**good, first: good[first].double() * 1e300},
    ):  # fmt: skip
        save_file(bad, path)
        refused(folder, name)
    save_file(good, path)
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    refused(folder, name)
    path.write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    refused(folder, name, "header")


class Payload:
    """What executes a command when a careless program unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def archived(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def entries_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def test_archives_that_are_no_plain_tensors(folder_of, tmp_path):
    folder, marker = folder_of("dictionary_learning"), tmp_path / "executed"
    path, name = folder / "ae.pt", "dictionary_learning"
    entries, good = entries_of(path), torch.load(path, weights_only=True)

    def check(data, match="."):
        path.write_bytes(data)
        refused(folder, name, match)
        assert not marker.exists()

    def replaced(text):
        return archived([(n, text if n.endswith("data.pkl") else d) for n, d in entries])

    check(replaced(pickle.dumps(Payload(marker))), "weights-only reader refuses it")
    check(replaced(pickle.dumps({**dict.fromkeys(good, 1), "k": Payload(marker)}, protocol=2)), "weights-only")
    check(pickle.dumps(Payload(marker)), "not a torch archive")
    torch.save({**good, "k": Payload(marker)}, path, _use_new_zipfile_serialization=False)
    check(path.read_bytes(), "not a torch archive")
    check(archived(entries, zipfile.ZIP_DEFLATED), "compressed")
    check(archived([*entries, ("archive/data/99", bytes(1 << 19))], zipfile.ZIP_DEFLATED), "overlap")
    check(archived([*entries, *((f"../../{i}", b"") for i in range(100))]), "too many")
    check(replaced(bytes(1 << 17)), "pickle has")
    check(archived([(n, d) for n, d in entries if not n.endswith("data/0")]))
    check(archived([]))
    check(archived(entries)[:-30])
    check(path.read_bytes()[:40])
    for bad in (
        [good], good["b_dec"], {**good, "more": good["b_dec"]}, {**good, "b_dec": torch.zeros(31)},
        {**good, "b_dec": good["b_dec"].int().bool()}, {**good, "b_dec": good["b_dec"].to_sparse()}, {**good, "b_dec": 3},
        {**good, "b_dec": good["b_dec"] * float("inf")}, {**good, "k": torch.tensor([4])}, {**good, 7: good["b_dec"]},
        {**good, "encoder.weight": torch.zeros(1).expand(1 << 40, 1 << 10)}, {**good, "b_dec": torch.zeros(32, device="meta")},
    ):  # fmt: skip
        torch.save(bad, path)
        check(path.read_bytes())
    path.write_bytes(archived([("../../escape", b"x"), *entries]))  # nothing is ever unpacked
    with pytest.raises(FormatError):
        import_sae(folder, name)
    assert not list(tmp_path.rglob("escape*"))
    torch.save(good, path)
    import_sae(folder, name)


def test_every_byte_of_an_archive_may_be_wrong(folder_of):
    """Flipped bytes end in our error or in an SAE, never in another exception."""
    folder = folder_of("dictionary_learning")
    data = (folder / "ae.pt").read_bytes()
    ends = [*range(400), *range(len(data) - 1400, len(data))]
    refusals = 0
    for at in ends[:: max(1, len(ends) // 250)]:
        (folder / "ae.pt").write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        try:
            import_sae(folder, "dictionary_learning")
        except FormatError:
            refusals += 1
    assert refusals > 50


def test_a_run_of_ours_that_was_changed(make, tmp_path):
    run, _, _ = make("topk")
    export_run(run, "actstore", tmp_path / "out")
    folder = tmp_path / "out" / run.digest
    data = bytearray((folder / "sae.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "sae.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="digest"):
        import_run(tmp_path / "out", "actstore", tmp_path / "other")
    (folder / "result.json").unlink()
    with pytest.raises(StoreNotFound, match="not finished"):
        import_run(tmp_path / "out", "actstore", tmp_path / "other")
    folder.rename(folder.with_name("0" * 64))
    with pytest.raises(FormatError, match="folder's name"):
        import_run(tmp_path / "out", "actstore", tmp_path / "other")
    with pytest.raises(FormatError, match="0 runs"):
        import_run(tmp_path / "other", "actstore", tmp_path / "other")


def test_formats_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(UsageError, match="no format"):
        import_sae(tmp_path, "nope")
    with pytest.raises(UsageError, match="is not read"):
        import_sae(tmp_path, "actstore")
    assert set(format_names(reading=True)) >= {"actstore", *BY} and {*CLASSES, "signed_topk"} <= {*architecture_names()}


# --- what holds rows of the store too, and the hub --------------------------------------------------------------------


@pytest.fixture
def opened(make, stores):
    """A finished run, its SAE, and what opens its store."""
    run, sae, _ = make("batchtopk")
    return run, sae, lambda: aligned(stores[:1])


def test_delphis_cache_holds_every_activation(opened, tmp_path):
    """delphi/latents/loader.py, TensorBuffer.load: locations + the file's first latent."""
    run, sae, sources = opened
    export_run(run, "delphi", tmp_path / "out", sources)
    (folder,) = (tmp_path / "out" / "latents").iterdir()
    assert folder.name == "blocks.0.hook_resid_pre"
    config = json.loads((folder / "config.json").read_text())
    store, seq_len = sources().first, config["ctx_len"]
    rows = store.rows // seq_len * seq_len
    codes = torch.zeros(rows // seq_len, seq_len, N)
    for path in folder.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        split = load_file(path)
        assert split["locations"].dtype == torch.uint16 and split["activations"].dtype == torch.float16
        assert split["tokens"].flatten().tolist() == store.read("tokens", 0, rows).tolist()
        at = split["locations"].to(torch.int64)
        assert at[:, 2].max() <= last - first
        codes[at[:, 0], at[:, 1], at[:, 2] + first] = split["activations"].float()
    with torch.no_grad():
        expected = sae.encode(torch.from_numpy(store[:rows].copy()))
    torch.testing.assert_close(codes.view(rows, N), expected * (expected.abs() > 1e-5), rtol=1e-3, atol=1e-5)


def test_delphis_cache_is_float32_where_float16_would_be_infinite(opened, tmp_path):
    run, sae, sources = opened
    with torch.no_grad():
        sae.W_enc.mul_(1e6)
    delphi.export_sae(run, sae, tmp_path / "out", sources)
    splits = [load_file(path) for path in (tmp_path / "out").rglob("*.safetensors")]
    assert all(split["activations"].dtype == torch.float32 and split["activations"].isfinite().all() for split in splits)


def test_neuronpedias_files_are_the_features(opened, tmp_path):
    """Field names as in SAEDashboard's neuronpedia_dashboard.py."""
    run, sae, sources = opened
    store, out = sources().first, tmp_path / "out"
    export_run(run, "neuronpedia", out, sources)
    batch, skipped = (json.loads((out / name).read_text()) for name in ("batch-0.json", "skipped_indexes.json"))
    assert batch["model_id"] and batch["layer"] == 0 and batch["sae_set"] == run.digest[:12]
    found = {feature["feature_index"]: feature for feature in batch["features"]}
    assert sorted([*found, *skipped["skipped_indexes"]]) == list(range(N)) and len(found) > 5
    with torch.no_grad():
        codes = sae.encode(torch.from_numpy(store[:].copy()))
    later = torch.tensor(store.read("positions", 0, store.rows).tolist()) > 0
    for index, feature in found.items():
        top = feature["activations"][0]
        assert max(top["values"]) == pytest.approx(codes[later, index].max().item(), rel=1e-2, abs=1e-3)
        assert len(top["tokens"]) == len(top["values"]) and top["bin_max"] == pytest.approx(
            max(top["values"]), rel=1e-2, abs=1e-3
        )
        assert sum(feature["freq_hist_data_bar_heights"]) == int((codes[later, index] != 0).sum())
        assert feature["frac_nonzero"] == pytest.approx(float((codes[later, index] != 0).float().mean()))
        assert {"pos_str", "neg_str", "correlated_features_indices", "n_prompts_total", "dataset"} <= feature.keys()


def test_a_cache_needs_the_store(opened, tmp_path):
    with pytest.raises(UsageError, match="rows of the store"):
        export_run(opened[0], "delphi", tmp_path / "out")


@pytest.mark.parametrize("name", ["saelens", "actstore", "sparsify"])
def test_a_push_is_the_files_and_a_card(make, name):
    run = make("topk")[0]
    files, card = push_run(run, "hf://user/repo", name, lambda: None, dry_run=True)
    paths = [path for path, _ in files]
    folder = run.digest[:12]
    assert f"{folder}/README.md" in paths and f"{folder}/actstore/{run.digest}/sae.safetensors" in paths
    assert (f"{folder}/cfg.json" in paths) == (name != "actstore")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert {line.partition(":")[0] for line in front.splitlines()} == {"library_name", "tags"}
    for fact in (run.digest, run.store, run.content_digest, "blocks.0.hook_resid_pre", "load"):
        assert fact in body


def test_a_strangers_names_stay_in_their_place_on_the_card(make):
    run, _, _ = make("topk")
    evil = "`</code>\n---\ntoken: x\n# [click](http://evil)"
    card = model_card(replace(run, key={**run.key, "hook": evil, "model": {"source": "hub", "name": evil}}), "a/b", "saelens")
    front = card.split("\n---\n")[0]
    assert "\ntoken" not in card and front.count("\n") == 3 and "\n# [click]" not in card


@pytest.mark.parametrize(
    "url", ["user/repo", "hf://repo", "hf://../repo", "hf://user/repo/more", "hf://u:t@x/y", "https://x/y", ""]
)
def test_only_repositories_of_the_hub_are_pushed_to(make, url):
    with pytest.raises(UsageError, match="no repository"):
        push_run(make("topk")[0], url, "saelens", lambda: None, dry_run=True)


def test_a_hub_out_of_reach_is_our_error(make, monkeypatch):
    import huggingface_hub

    def refuse(self, *args, **kwargs):
        raise RuntimeError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(StorageFailed, match="no route"):
        push_run(make("topk")[0], "hf://user/repo", "saelens", lambda: None)
