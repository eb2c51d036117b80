"""Token ids, chats and hub streams through a whole capture: what is stored, what is in the key, what is resumed."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
from helpers import TINY, words, write_jsonl

from actstore import records
from actstore.backends import load_backend
from actstore.backends._folder import TOKENIZER_FILES
from actstore.capture import CaptureRequest, Progress, StoppedError, capture
from actstore.catalog import list_stores, open_store
from actstore.errors import CorpusError, UsageError
from actstore.key import HubCorpus, StoreKey, dump_key, parse_key
from actstore.layout import SPOOL
from actstore.reader import Store
from actstore.repair import request_of

CHAT = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def captured(request: CaptureRequest) -> Store:
    return open_store(capture(request)[0], request.stores)


def tokens(store: Store) -> list[int]:
    return store.read("tokens", 0, store.rows).tolist()


def test_fields_that_came_later_leave_the_digests_of_older_keys_alone(toy_store):
    key = toy_store.key
    assert b"content" not in dump_key(key) and b"chat_template" not in dump_key(key)
    assert parse_key(dump_key(key)) == key
    later = key.model_copy(update={"content": "tokens"})
    assert b'"content":"tokens"' in dump_key(later) and parse_key(dump_key(later)) == later
    assert StoreKey.model_validate(later.model_dump()) == later


def test_a_column_of_token_ids_gives_what_tokenizing_gives(toy_request, tmp_path):
    text = words(60)
    of_text = captured(toy_request(bos=False))
    corpus = lines(tmp_path / "ids.jsonl", [{"meta": {"ids": list(t.encode())}} for t in text])
    of_ids = captured(toy_request(corpus=(corpus,), token_field="meta.ids"))
    assert tokens(of_ids) == tokens(of_text) and of_ids.key.content == "tokens" and of_ids.key.sequences.bos is False
    assert tokens(captured(toy_request(corpus=(corpus,), token_field="meta.ids", bos=True)))[0] == 256
    again = request_of(of_ids, "toy:16", (corpus,), tmp_path)
    assert (again.token_field, again.bos) == ("meta.ids", False)
    with pytest.raises(UsageError, match="--chat-template makes text"):
        toy_request(token_field="ids", chat_template="default")


@pytest.fixture
def chat_model(tmp_path) -> Path:
    """The embedded model with a chat template of its own."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def test_chats_are_rendered_by_the_tokenizers_template_with_one_bos(chat_model, tmp_path):
    assert "tokenizer_config.json" in TOKENIZER_FILES
    corpus = lines(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20)
    request = CaptureRequest(
        str(chat_model), ("blocks.0.hook_resid_pre",), (corpus,), text_field="messages", chat_template="default",
        packing="truncate", stores=tmp_path / "stores",
    )  # fmt: skip
    store = captured(request)
    backend = load_backend("auto", str(chat_model), None, "auto", "cpu")
    rendered = "<user>Say hello.\n<assistant>Hello.\n"
    one = ([backend.bos] if backend.bos is not None else []) + backend.tokenize([rendered])[0]
    assert tokens(store) == one * 20
    assert backend.render(CHAT, TEMPLATE) == rendered  # the template's BOS is left to --bos
    mine = tmp_path / "mine.jinja"
    mine.write_text(TEMPLATE.replace("<", "["))
    other = captured(CaptureRequest(**{**{f: getattr(request, f) for f in request.__slots__}, "chat_template": str(mine)}))
    assert other.digest != store.digest and other.key.chat_template != store.key.chat_template
    assert request_of(other, str(chat_model), (corpus,), tmp_path, str(mine)).chat_template == str(mine)


def test_templates_that_cannot_be_used_are_refused_by_name(chat_model, tmp_path):
    corpus = lines(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20)
    backend = load_backend("auto", str(chat_model), None, "auto", "cpu")
    for template in ("{{ messages[5].content }}{{ x.y.z }}", "{% for %}", "{{ raise_exception('roles must alternate') }}",
                     "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 + 'a' }}"):  # fmt: skip
        with pytest.raises(ValueError):
            backend.render(CHAT, template)
    for model, template, what in (
        (TINY, "default", "no chat template"), (chat_model, str(tmp_path / "none.jinja"), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=what):
            capture(CaptureRequest(str(model), ("hook_embed",), (corpus,), text_field="messages", chat_template=template))


# --- hub streams ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub dataset that lies in a local folder, and the indices of the records pulled from it."""
    (tmp_path / "data").mkdir()
    text = words(1500, 8)
    for shard in range(3):
        write_jsonl(tmp_path / "data" / f"train-{shard}.jsonl", text[shard * 500 : (shard + 1) * 500])
    commit = HubCorpus(dataset=str(tmp_path / "data"), split="train", revision="main")
    capture_module = importlib.import_module("actstore.capture")  # the package has a function of that name
    monkeypatch.setattr(capture_module, "identify_dataset", lambda *args: commit)
    monkeypatch.setattr("actstore.manifest.MAX_CHUNK_BYTES", 1024 * 16 * 4)
    pulled: list[str] = []
    real = records.HubStream.records

    def counting(self):
        for place, record in real(self):
            pulled.append(place)
            yield place, record

    monkeypatch.setattr(records.HubStream, "records", counting)
    return pulled


def stopped(request: CaptureRequest, after: int = 20) -> Path:
    """Stop a capture after some row groups; return the folder of its unsealed store."""
    asked = iter([False] * after + [True])
    with pytest.raises(StoppedError):
        capture(request, Progress(stop=lambda: next(asked)))
    (unsealed,) = [line.digest for line in list_stores(request.stores) if not line.sealed]
    return request.stores / ".staging" / unsealed


def hub_request(toy_request, **fields) -> CaptureRequest:
    return toy_request(**{"corpus": (), "dataset": "some/dataset", "batch_tokens": 1024, **fields})


def test_a_stream_goes_on_where_it_stopped_and_gives_the_same_store(toy_request, hub, tmp_path):
    alone = captured(hub_request(toy_request, stores=tmp_path / "alone"))
    assert len(hub) == 1500
    request = hub_request(toy_request, max_documents=1400)
    reference = captured(hub_request(toy_request, max_documents=1400, stores=tmp_path / "alone"))
    for fields, whole in (({}, alone), ({"max_documents": 1400}, reference)):
        request = hub_request(toy_request, **fields)
        hub.clear()
        folder = stopped(request)
        first = len(hub)
        assert (folder / SPOOL).stat().st_size > 0 and first >= 256
        hub.clear()
        (digest,) = capture(request)
        assert len(hub) + first // 256 * 256 <= 1500 and (not hub or hub[0].endswith(f"row {first // 256 * 256}"))
        store = open_store(digest, request.stores)
        assert store.content_digest == whole.content_digest and not (store.path / SPOOL).exists()


@pytest.mark.parametrize("damage", ["torn", "flipped", "another", "link", "empty"])
def test_a_damaged_spool_costs_streaming_and_nothing_else(toy_request, hub, tmp_path, damage):
    alone = captured(hub_request(toy_request, stores=tmp_path / "alone"))
    request = hub_request(toy_request)
    path = stopped(request) / SPOOL
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    if damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        changed = {
            "torn": data[:-100], "flipped": data[: first + 500] + bytes([data[first + 500] ^ 1]) + data[first + 501 :],
            "another": data[:first] + b"0" * 64 + b" {}\n", "empty": b"",
        }  # fmt: skip
        path.write_bytes(changed[damage])
    hub.clear()
    (digest,) = capture(request)
    assert open_store(digest, request.stores).content_digest == alone.content_digest
    assert hub[0].endswith("row 0" if damage in ("link", "empty") else "row 256" if damage != "torn" else hub[0].split("row ")[1])
    assert damage != "link" or (tmp_path / "elsewhere").read_bytes() == data


def test_the_model_runs_while_a_stream_is_read(toy_request, hub):
    """The first row group is committed before the last record has been pulled."""
    at_commit: list[int] = []
    capture(hub_request(toy_request), Progress(on_commit=lambda: at_commit.append(len(hub))))
    assert at_commit[0] <= len(hub) == 1500


def test_a_bad_record_of_a_stream_is_named(toy_request, hub, tmp_path):
    with open(tmp_path / "data" / "train-2.jsonl", "a") as file:
        file.write(json.dumps({"text": "last"}) + "\n" + json.dumps({"text": None}) + "\n")
    with pytest.raises(CorpusError, match="not text") as caught:
        capture(hub_request(toy_request))
    assert caught.value.where.endswith("row 1501")
    assert captured(hub_request(toy_request, bad_lines="skip")).rows
