"""The endpoint's client against a server of its own on 127.0.0.1 that answers well, badly, slowly, or not at all."""

from __future__ import annotations

import json
import time

import pytest
from endpoint import chat, sensible, serving

from actstore.errors import FormatError, StorageFailed, UsageError
from trainer.judge import MAX_ANSWER_BYTES, Endpoint, ask, detect, explain
from trainer.labels import MAX_TEXT
from trainer.latents import Context


def quick(url, **options):
    return Endpoint(url, "judge-1", **{"timeout_s": 5.0, "pause_s": 0.01, **options})


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_question_is_asked_as_the_protocol_says():
    with serving(lambda body, n: (200, {}, chat("hello"))) as stub:
        for url in (stub.url, stub.url + "/", stub.url + "/v1", stub.url + "/v1/chat/completions"):
            assert ask(quick(url), "be kind", "hi") == "hello"
    assert set(stub.paths) == {"/v1/chat/completions"}
    assert stub.asked[0]["model"] == "judge-1" and stub.asked[0]["temperature"] == 0
    assert stub.asked[0]["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert not any(name.lower() == "authorization" for name in stub.headers[0])


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(lambda body, n: (401, {}, b'{"error": "bad key"}')) as stub, pytest.raises(UsageError) as caught:
        ask(quick(stub.url), "s", "u")
    assert stub.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(caught.value) + repr(quick(stub.url)) + json.dumps(stub.asked)
    assert len(stub.asked) == 1 and "bad key" in caught.value.what  # refused is not asked again


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://h/",
        "127.0.0.1:8000",
        "http://",
        "http://u:p@h/",
        "http://h/?k=1",
        "http://h:99999/",
        "http://[x",
    ],
)
def test_what_is_no_endpoint_is_refused(url):
    with pytest.raises(UsageError):
        Endpoint(url, "m")


def test_the_key_never_crosses_a_network_unencrypted(monkeypatch):
    Endpoint("http://far.example:8000", "m")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(UsageError, match="unencrypted"):
        Endpoint("http://far.example:8000", "m")
    Endpoint("https://far.example", "m")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret")
    with pytest.raises(UsageError) as caught:
        Endpoint("https://far.example", "m")
    assert "sec" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    Endpoint("http://127.0.0.1:1", "m")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_later_each_time(status):
    waits = []
    with serving(lambda body, n: (200, {}, chat("ok")) if n == 4 else (status, {}, b"busy")) as stub:
        assert ask(quick(stub.url, pause_s=0.5), "s", "u", wait=lambda s: waits.append(s)) == "ok"
    assert len(stub.asked) == 4 and waits == [0.5, 1.0, 2.0]


def test_retry_after_is_kept_to_up_to_a_minute():
    waits = []
    headers = iter([{"Retry-After": "7"}, {"Retry-After": "9999"}, {"Retry-After": "soon"}])
    with serving(lambda body, n: (200, {}, chat("ok")) if n == 4 else (429, next(headers), b"")) as stub:
        ask(quick(stub.url), "s", "u", wait=lambda s: waits.append(s))
    assert waits[:2] == [7.0, 60.0] and waits[2] < 1


def test_a_server_that_stays_broken_or_away_is_a_named_error():
    with (
        serving(lambda body, n: (500, {}, b"\x1b[31moops")) as stub,
        pytest.raises(StorageFailed, match="3 tries: HTTP 500") as caught,
    ):
        ask(quick(stub.url, tries=3), "s", "u")
    assert len(stub.asked) == 3 and "\x1b" not in str(caught.value)
    with pytest.raises(StorageFailed, match="ConnectError"):
        ask(quick(stub.url, tries=2), "s", "u")  # nobody listens there any more


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b'{"choices": {"0": 1}}',
     b'{"choices": [{"message": "x"}]}', b'{"a": 1, "a": 2}', b'{"choices": [{"message": {"content": NaN}}]}', b"[" * 5000],
)  # fmt: skip
def test_garbage_is_a_format_error(body):
    with serving(lambda b, n: (200, {}, body)) as stub, pytest.raises(FormatError):
        ask(quick(stub.url), "s", "u")
    assert len(stub.asked) == 1


def test_an_answer_without_end_is_cut():
    endless = [b"x" * 8192] * (2 * MAX_ANSWER_BYTES // 8192)
    with serving(lambda body, n: (200, {}, endless)) as stub:
        stub.drip_s = 0
        with pytest.raises(FormatError, match="over"):
            ask(quick(stub.url), "s", "u")


def test_a_slow_server_is_given_up_in_time_even_if_it_drips():
    with serving(lambda body, n: (200, {}, [b" "] * 400)) as stub:
        begun = time.monotonic()
        with pytest.raises(StorageFailed, match="not finished after"):
            ask(quick(stub.url, timeout_s=0.8, tries=2), "s", "u")
    assert time.monotonic() - begun < 15 and len(stub.asked) == 2  # all of it would take 20 s
    with (
        serving(lambda body, n: time.sleep(0.8) or (200, {}, chat("late"))) as stub,
        pytest.raises(StorageFailed, match="ReadTimeout"),
    ):
        ask(quick(stub.url, timeout_s=0.2, tries=1), "s", "u")


def test_a_redirect_is_not_followed():
    with serving(lambda body, n: (200, {}, chat("stolen"))) as other:
        moved = lambda body, n: (307, {"Location": other.url + "/v1/chat/completions"}, b"")  # noqa: E731
        with serving(moved) as stub, pytest.raises(UsageError, match="307"):
            ask(quick(stub.url), "s", "u")
    assert other.asked == []


def context(text, marked=()):
    tokens = [f" {word}" for word in text.split()]
    return Context(1.0, 0.5, 0, 0, tokens, [float(t.strip() in marked) for t in tokens], 0)


def test_contexts_are_shown_with_their_active_tokens_marked():
    asked = []
    label = explain(
        lambda s, u: asked.append(u) or "First.\nLABEL: words for  rivers\n", [context("the river bank here", ("river", "bank"))]
    )
    assert asked == ["1. the<< river bank>> here"] and label == "words for rivers"


@pytest.mark.parametrize("answer", ["", "rivers", "LABEL:", "LABEL: \x00 \x1b"])
def test_an_answer_without_a_label_is_a_format_error(answer):
    with pytest.raises(FormatError):
        explain(lambda s, u: answer, [context("a b")])


def test_a_label_is_cut_and_stripped():
    label = explain(lambda s, u: "LABEL: " + "\x1b[31m\u202e" + "long " * 500, [context("a b")])
    assert len(label) == MAX_TEXT and label.endswith("…") and label.isprintable()


def test_detection_scores_are_those_computed_by_hand():
    """10 active, 10 not; the judge finds 8 of the active and takes 3 of the others for active: 0.8, 0.7."""
    active = [context(f"yes{i}") for i in range(10)]
    inactive = [context(f"no{i}") for i in range(10)]
    said = {f"yes{i}" for i in range(8)} | {"no0", "no1", "no2"}

    def judge(system, user):
        return f"Sure: {[int(line.split(': ')[1] in said) for line in user.splitlines() if line.startswith('Text')]}."

    accuracy, f1, judged = detect(judge, "label", active, inactive, seed=1)
    assert (accuracy, f1, judged) == (pytest.approx((0.8 + 0.7) / 2), pytest.approx(16 / (16 + 3 + 2)), 20)


def test_what_a_judge_sees_is_mixed_and_unmarked():
    asked = []
    active, inactive = [context(f"yes{i}", (f"yes{i}",)) for i in range(10)], [context(f"no{i}") for i in range(10)]
    detect(lambda s, u: asked.append(u) or "[1,1,1,1,1]", "a label", active, inactive, seed=1)
    assert len(asked) == 4 and all(u.startswith("Pattern: a label\n") and "<<" not in u for u in asked)
    order = [line.split(": ")[1] for u in asked for line in u.splitlines() if line.startswith("Text")]
    assert sorted(order) == sorted(c.text.strip() for c in active + inactive) and order != sorted(order, reverse=True)


@pytest.mark.parametrize("answer", ["no idea", "[1,0]", "[1,0,1,2,0]", "[1,1,1,1,1,1]", ""])
def test_questions_without_a_list_of_the_right_length_do_not_count(answer):
    active, inactive = [context(f"yes{i}") for i in range(5)], [context(f"no{i}") for i in range(5)]
    assert detect(lambda s, u: answer, "label", active, inactive, seed=1) == (None, None, 0)


def test_garbage_as_a_verdict_costs_that_question_only():
    answers = iter([FormatError("garbage")])

    def judge(system, user):
        for error in answers:
            raise error
        return str([int(": yes" in line) for line in user.splitlines() if line.startswith("Text")])

    active, inactive = [context(f"yes{i}") for i in range(10)], [context(f"no{i}") for i in range(10)]
    assert detect(judge, "label", active, inactive, seed=1) == (1.0, 1.0, 15)


def test_thoughts_before_the_answer_are_left_out():
    active, inactive = [context(f"yes{i}") for i in range(5)], [context(f"no{i}") for i in range(5)]
    judge = lambda s, u: f"<think>maybe [0,0,0,0,0]</think>{[int(': yes' in x) for x in u.splitlines() if x[:4] == 'Text']}"  # noqa: E731
    assert detect(judge, "label", active, inactive, seed=1) == (1.0, 1.0, 10)


def test_the_stub_itself_labels_and_judges():
    with serving(sensible) as stub:
        question = lambda s, u: ask(quick(stub.url), s, u)  # noqa: E731
        label = explain(question, [context("the river bank", ("bank",))])
        assert label == "the word bank"
        assert detect(question, label, [context("a bank")] * 3, [context("a hill")] * 3, 0) == (1.0, 1.0, 6)
