"""The rows of the reference study, against its rule written out with transformers alone (research/ecosystem.md, 3.2)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from actstore_cli.actstore import main as actstore_main
from click.testing import CliRunner
from helpers import TINY, flip, reopened, shared_fixture, writable, write_jsonl

from actstore.capture import CaptureRequest, derive
from actstore.catalog import open_store
from actstore.errors import UsageError
from actstore.key import SequenceRule, parse_key, store_digest
from actstore.layout import chunk_name
from actstore.reference_rows import STUDY_TOKENS, padded_documents
from actstore.repair import repair, request_of

HOOK, SEQ_LEN, TOGETHER = "blocks.2.hook_resid_pre", 24, 5
TEXTS = [
    "  def first(x):\n    return x + 1  # leading and trailing space goes  \n\n",
    "short",
    " \n\t ",  # nothing is left of it: not counted
    "a document that mentions <|endoftext|> in its text, which is a special token and goes; the rest of it goes on and on " * 2,
    "naïve café ☃☃☃ 日本語の文章です。もっと長い文章が必要です。 " * 3,
    "class Long:\n    " + "def method(self, value): return self.value + value\n    " * 6,
    "the second block begins here, and is padded to its own longest document",
    "x",
]


def capture(folder, *more):
    corpus = write_jsonl(folder / "corpus.jsonl", TEXTS)
    args = [
        "capture",
        "--preset",
        "reference",
        "--model",
        TINY,
        "--hook",
        HOOK,
        "--corpus",
        corpus,
        "--stores",
        folder / "stores",
    ]
    return CliRunner().invoke(actstore_main, [str(a) for a in (*args, "--seq-len", SEQ_LEN, "--pad-together", TOGETHER, *more)])


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    result = capture(folder)
    assert result.exit_code == 0, result.stderr
    return folder, open_store(result.stdout.strip(), folder / "stores"), result.stderr


def block_by_the_study(texts):
    """Token ids (documents, longest) and centred activations of documents captured together, in transformers' own words."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    cut = [tokenizer.encode(text.strip(), add_special_tokens=False)[:SEQ_LEN] for text in texts]
    again = [tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=True), add_special_tokens=False) for ids in cut]
    longest = max(map(len, again))
    ids = torch.tensor([[tokenizer.bos_token_id, *x, *[tokenizer.eos_token_id] * (longest - len(x))] for x in again])
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]  # no mask: padding attends like anything else
    return ids, hidden - hidden.mean(-1, keepdim=True)


def test_the_rows_are_the_studys_block_after_block(captured):
    _, store, said = captured
    kept = [text for text in TEXTS if text.strip()]
    blocks = [block_by_the_study(kept[:TOGETHER]), block_by_the_study(kept[TOGETHER:])]
    assert store.rows == sum(ids.numel() for ids, _ in blocks) and blocks[0][0].shape[1] != blocks[1][0].shape[1]
    np.testing.assert_array_equal(store.read("tokens", 0, store.rows), np.concatenate([ids.flatten() for ids, _ in blocks]))
    np.testing.assert_allclose(store[:], np.concatenate([acts.flatten(0, 1) for _, acts in blocks]), atol=2e-5)
    lengths = [ids.shape[1] for ids, _ in blocks for _ in ids]
    at = [i for i, text in enumerate(TEXTS) if text.strip()]
    assert store.read("documents", 0, store.rows).tolist() == [i for i, n in zip(at, lengths, strict=True) for _ in range(n)]
    assert store.read("positions", 0, store.rows).tolist() == [p for n in lengths for p in range(n)]
    assert store.dtype == store.key.compute_dtype == "float32" and store.key.center and store.key.max_documents == 1000
    assert "given here: --seq-len 24\n" in said and "--packing reference" in said


def test_the_key_says_how_many_are_padded_together_and_older_keys_say_nothing(captured):
    store = captured[1]
    assert json.loads((store.path / "key.json").read_bytes())["sequences"] == {
        "bos": True, "packing": "reference", "pad_together": TOGETHER, "seq_len": SEQ_LEN,
    }  # fmt: skip
    assert store_digest(parse_key((store.path / "key.json").read_bytes())) == store.digest
    assert SequenceRule(packing="pack", seq_len=8, bos=True).model_dump() == {"packing": "pack", "seq_len": 8, "bos": True}
    for wrong in ({"packing": "reference"}, {"packing": "pack", "pad_together": 3}):
        with pytest.raises(ValueError, match="pad_together"):
            SequenceRule(seq_len=8, bos=True, **wrong)


def test_a_damaged_row_group_is_computed_again_from_the_key(captured, tmp_path):
    result = capture(tmp_path)
    store = open_store(result.stdout.strip(), tmp_path / "stores")
    flip(writable(store) / chunk_name("acts", 0), 100)
    request = request_of(store, str(TINY), (tmp_path / "corpus.jsonl",), tmp_path / "stores")
    assert repair(request, store, tmp_path / "stores").repaired == [0]
    np.testing.assert_array_equal(reopened(store)[:], captured[1][:])


def test_the_published_number_of_documents_is_the_default(tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", ["some text " * 9] * 3)
    request = {"model": "toy:4", "backend": "toy", "hooks": ("hook_embed",), "corpus": (corpus,), "packing": "reference"}
    assert [derive(CaptureRequest(**request, seq_len=n)).keys[0].sequences.pad_together for n in (64, 9000)] == [125, 1]
    keys = [derive(CaptureRequest(**request, pad_together=n)).keys[0] for n in (None, 2, 3)]
    assert len({store_digest(key) for key in keys}) == 3
    with pytest.raises(UsageError, match="only --packing reference"):
        CaptureRequest(**{**request, "packing": "pack"}, pad_together=3)


def test_beyond_the_context_is_refused_bos_counted(tmp_path):
    result = capture(tmp_path, "--seq-len", transformers.AutoConfig.from_pretrained(TINY).max_position_embeddings)
    assert result.exit_code == 2 and "longer than the model's context" in result.stderr


def test_the_published_counts_come_out_of_the_pile_and_gpt2s_tokenizer():
    """8,125 rows of 8,000 tokens in sequences of 64, and 30,186 of 30,000 in 128: BOS on top of full documents."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_fixture("gpt2-tokenizer"))
    lines = shared_fixture("corpus").joinpath("pile-test-10mb.jsonl").read_text().splitlines()[:234]
    backend = SimpleNamespace(
        tokenize=lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"],
        decode=lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True), pad=50256, context=1024,
    )  # fmt: skip
    documents = list(enumerate(backend.tokenize([json.loads(line)["text"].strip() for line in lines])))
    for max_tokens, seq_len, rows in ((STUDY_TOKENS, 64, 8125), (30_000, 128, 30_186)):
        together = max_tokens // seq_len
        rule = SequenceRule(packing="reference", seq_len=seq_len, bos=True, pad_together=together)
        assert sum(1 + len(ids) for _, ids in padded_documents(documents[:together], rule, backend)) == rows
