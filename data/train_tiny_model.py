"""Train the embedded model: a 4-layer GPT-2 and its byte-level BPE tokenizer, from data/corpus/stdlib.jsonl alone.

Every twentieth document is held out. Prints and writes into the model card the held-out loss beside a unigram
baseline (add-one smoothed token counts of the training documents). About 25 minutes on 2 cores.

    python data/train_tiny_model.py [CORPUS.jsonl [OUT_DIR [TOKENS]]]     # default data/tiny-gpt2, 6,000,000 tokens seen
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY, SEQ_LEN, BATCH, SEED = 4096, 128, 32, 0
PEAK_LR, WARMUP_STEPS = 3e-3, 100
BOS = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCABULARY tokens; token 0 is BOS, EOS and unknown, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS, model_max_length=SEQ_LEN
    )


def sequences(documents: list[list[int]]) -> np.ndarray:
    """Return (n, SEQ_LEN) int64: BOS and then SEQ_LEN - 1 consecutive tokens of the joined documents."""
    tokens = np.concatenate([np.asarray(d, np.int64) for d in documents])
    n = len(tokens) // (SEQ_LEN - 1)
    body = tokens[: n * (SEQ_LEN - 1)].reshape(n, SEQ_LEN - 1)
    return np.concatenate([np.zeros((n, 1), np.int64), body], axis=1)


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the mean negative log-likelihood (nats/token) of held_out[:, 1:] under train's add-one token counts."""
    counts = np.bincount(train[:, 1:].reshape(-1), minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[held_out[:, 1:].reshape(-1)].mean())


@torch.inference_mode()
def model_loss(model: GPT2LMHeadModel, rows: np.ndarray) -> float:
    """Return the mean next-token loss in nats of `rows` (n, SEQ_LEN), float32."""
    losses = [float(model(batch, labels=batch).loss) * len(batch) for batch in torch.from_numpy(rows).split(BATCH)]
    return sum(losses) / len(rows)


def train(model: GPT2LMHeadModel, rows: np.ndarray, steps: int) -> None:
    """Train in place with AdamW, linear warm-up and cosine decay to zero, float32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    order, start = np.random.default_rng(SEED), time.monotonic()
    queue = np.zeros(0, np.int64)
    for step in range(steps):
        if len(queue) < BATCH:
            queue = np.concatenate([queue, order.permutation(len(rows))])
        batch, queue = torch.from_numpy(rows[queue[:BATCH]]), queue[BATCH:]
        rate = min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * rate
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            rows_s = (step + 1) * BATCH * SEQ_LEN / (time.monotonic() - start)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {rows_s:.0f} tokens/s", flush=True)


CARD = """# tiny-gpt2: the embedded model of actstore

GPT-2 architecture: {layers} layers, d_model {width}, {heads} heads, context {context}, {parameters:,} parameters, tied
embeddings, weights in float16. Byte-level BPE tokenizer of {vocabulary} tokens (token 0, `{bos}`, is BOS).

Trained by `data/train_tiny_model.py` from random weights on the corpus that `data/build_corpus.py` makes of the
Python {python} standard library (PSF licence): {train_tokens:,} training tokens, {seen:,} seen, {minutes:.0f} minutes on 2 cores.
The tokenizer was trained on the same text. It knows Python's standard library and nothing else; it is here so that
the demo and the tests need no download. Corpus sha256: `{digest}`.

| held-out documents (every twentieth), nats/token | |
|---|---|
| unigram baseline (add-one counts of the training documents) | {unigram:.3f} |
| tiny-gpt2 (float16 weights, as committed) | {loss:.3f} |
| better by | {better:.3f} |
"""


def main() -> None:
    """Train tokenizer and model, save them as an ordinary Hugging Face folder with a model card."""
    corpus = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "corpus" / "stdlib.jsonl"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "tiny-gpt2"
    wanted = int(sys.argv[3]) if len(sys.argv) > 3 else 6_000_000
    torch.manual_seed(SEED)
    raw, start = corpus.read_bytes(), time.monotonic()
    texts = [json.loads(line)["text"] for line in raw.splitlines()]
    train_texts = [t for i, t in enumerate(texts) if i % 20]
    tokenizer = train_tokenizer(train_texts)
    training = sequences(tokenizer(train_texts)["input_ids"])
    held_out = sequences(tokenizer(texts[::20])["input_ids"])
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=SEQ_LEN, n_embd=192, n_layer=4, n_head=6,
                        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    train(model, training, wanted // (BATCH * SEQ_LEN))
    model.eval()
    model.half().save_pretrained(out)
    config.dtype = "float32"  # what to compute in: float16 is stored, and slow on a CPU
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    loss, unigram = model_loss(model.float(), held_out), unigram_loss(training, held_out)
    card = CARD.format(
        layers=config.n_layer, width=config.n_embd, heads=config.n_head, context=config.n_positions,
        parameters=model.num_parameters(), vocabulary=VOCABULARY, bos=BOS, python=sys.version.split()[0],
        train_tokens=training.size, seen=wanted, minutes=(time.monotonic() - start) / 60,
        digest=hashlib.sha256(raw).hexdigest(), unigram=unigram, loss=loss, better=unigram - loss,
    )  # fmt: skip
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
