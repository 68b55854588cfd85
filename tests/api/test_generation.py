"""What both endpoints say, and that a stream says the same as a whole answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nybble.engine.request import Delta, Request, SamplingParams, TokenLogprob
from support_engine import FakeEngine, says
from support_http import Served, serving

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
UTF8 = "naïve 👩‍👩‍👧 日本語 🇩🇪 e\u0301 – end"  # noqa: RUF001


def body_for(route: str, **extra: Any) -> dict[str, Any]:
    start: dict[str, Any] = (
        {"prompt": "hi"} if route == COMPLETION else {"messages": [{"role": "user", "content": "hi"}]}
    )
    return {**start, "max_tokens": 200, **extra}


def text_of(choice: dict[str, Any]) -> str:
    """Of a whole choice or of a chunk's."""
    if "text" in choice:
        return str(choice["text"])
    return str(choice.get("message", choice.get("delta", {})).get("content", ""))


def joined(events: list[dict[str, Any]], index: int = 0) -> tuple[str, list[str], list[Any]]:
    """Text, finish reasons and logprobs of one choice of a stream."""
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
    scores = [part["logprobs"] for part in parts if part["logprobs"]]
    return "".join(text_of(part) for part in parts), reasons, scores


CASES: dict[str, tuple[str | bytes, dict[str, Any], str, str]] = {
    "plain": ("Hello, world!", {}, "Hello, world!", "stop"),
    "length": ("Hello, world!", {"max_tokens": 5}, "Hello", "length"),
    "utf8": (UTF8, {}, UTF8, "stop"),
    "cut-character": ("aé", {"max_tokens": 2}, "a\ufffd", "length"),
    "bad-bytes": (b"a\xffb", {}, "a\ufffdb", "stop"),
    "stop": ("one two three", {"stop": " t"}, "one", "stop"),
    "stop-list": ("one two three", {"stop": ["x", "three", None]}, "one two ", "stop"),
    "stop-overlap": ("aabaabaaac", {"stop": "aabaaa"}, "aab", "stop"),
    "stop-start-only": ("one tw", {"stop": "two"}, "one tw", "stop"),
    "stop-at-once": ("###", {"stop": "#"}, "", "stop"),
    "stop-utf8": ("a👍b👎c", {"stop": "👎"}, "a👍b", "stop"),
    "stop-at-length": ("abcEND", {"stop": "END", "max_tokens": 6}, "abc", "stop"),
    "stop-null": ("abc", {"stop": [None]}, "abc", "stop"),
    "min-tokens": ("a.b.c", {"stop": ".", "min_tokens": 3}, "a.b", "stop"),
    "ignore-eos": ("ab", {"ignore_eos": True, "max_tokens": 5}, "ababa", "length"),
    "nothing": ("", {}, "", "stop"),
}


@pytest.mark.parametrize("logprobs", [False, True], ids=["bare", "logprobs"])
@pytest.mark.parametrize("route", [COMPLETION, CHAT])
@pytest.mark.parametrize("case", CASES)
def test_stream_equals_whole(
    served: Served, shared_engine: FakeEngine, route: str, case: str, logprobs: bool
) -> None:
    script, extra, text, reason = CASES[case]
    shared_engine.script = says(script)
    scores = {"logprobs": 2 if route == COMPLETION else True} if logprobs else {}
    whole = served.post(route, body_for(route, **extra, **scores)).json()
    events = served.events(route, body_for(route, **extra, **scores))
    choice = whole["choices"][0]
    assert (text_of(choice), choice["finish_reason"]) == (text, reason)
    streamed, reasons, streamed_scores = joined(events)
    assert (streamed, reasons) == (text, [reason])
    assert events[-1]["choices"][0]["finish_reason"] == reason
    assert len({(event["id"], event["created"], event["object"], event["model"]) for event in events}) == 1
    if logprobs:
        assert merged(streamed_scores) == {key: value for key, value in choice["logprobs"].items() if value}
    else:
        assert choice["logprobs"] is None and not streamed_scores


def merged(parts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for part in parts:
        for key, value in part.items():
            if value:
                found.setdefault(key, []).extend(value)
    return found


@pytest.mark.parametrize("route", [COMPLETION, CHAT])
def test_no_piece_of_a_stream_cuts_a_character(served: Served, shared_engine: FakeEngine, route: str) -> None:
    shared_engine.script = says(UTF8)
    pieces = [
        text_of(choice) for event in served.events(route, body_for(route)) for choice in event["choices"]
    ]
    assert len([piece for piece in pieces if piece]) == len(UTF8)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("route", [COMPLETION, CHAT])
def test_stop_string_never_shows(served: Served, shared_engine: FakeEngine, route: str) -> None:
    shared_engine.script = says("aSTOxSTOP more")
    events = served.events(route, body_for(route, stop="STOP"))
    assert joined(events)[0] == "aSTOx"
    assert "".join(text_of(choice) for choice in events[-1]["choices"]) == ""


def test_stop_string_frees_the_engine(folder: Any, served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = says("one two", pause=0.01)
    before = len(shared_engine.aborted)
    served.post(COMPLETION, body_for(COMPLETION, stop=" ", ignore_eos=True))
    assert len(shared_engine.aborted) == before + 1
    assert shared_engine.stats().running == 0


def test_chat_stream_begins_with_the_role(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = says("abc")
    events = served.events(CHAT, body_for(CHAT, n=2))
    for index in (0, 1):
        deltas = [c["delta"] for event in events for c in event["choices"] if c["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all("role" not in delta for delta in deltas[1:])


@pytest.mark.parametrize("route", [COMPLETION, CHAT])
@pytest.mark.parametrize("include", [None, False, True])
@pytest.mark.parametrize("continuous", [None, True])
def test_usage_chunks(
    served: Served, shared_engine: FakeEngine, route: str, include: bool | None, continuous: bool | None
) -> None:
    shared_engine.script = says("abc")
    options = {"include_usage": include, "continuous_usage_stats": continuous}
    events = served.events(route, body_for(route, stream_options=options))
    usage = served.post(route, body_for(route)).json()["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    if not include:
        assert all("usage" not in event and event["choices"] for event in events)
        return
    *others, last = events
    assert last["choices"] == [] and last["usage"] == usage
    assert all(event["choices"] for event in others)
    if continuous:
        assert [event["usage"]["completion_tokens"] for event in others if text_of(event["choices"][0])] == [
            1,
            2,
            3,
        ]
    else:
        assert all(event["usage"] is None for event in others)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_choices_of_several_prompts(served: Served, shared_engine: FakeEngine, stream: bool) -> None:
    """Choice i * n + j is the j-th of the i-th prompt, and a prompt counts once."""
    shared_engine.script = lambda request: says(bytes(request.prompt[-1:]) * 3)(request)
    body = body_for(
        COMPLETION, prompt=["a", "b", "c"], n=2, stream_options={"include_usage": True} if stream else None
    )
    if stream:
        events = served.events(COMPLETION, body)
        texts = [joined(events, i)[0] for i in range(6)]
        assert [joined(events, i)[1] for i in range(6)] == [["stop"]] * 6
        usage = events[-1]["usage"]
    else:
        whole = served.post(COMPLETION, body).json()
        assert [choice["index"] for choice in whole["choices"]] == list(range(6))
        texts, usage = [text_of(choice) for choice in whole["choices"]], whole["usage"]
    assert texts == ["aaa", "aaa", "bbb", "bbb", "ccc", "ccc"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 18)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(256, 97, 98)]),
        (["ab", "c"], [(256, 97, 98), (256, 99)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
        ("<|im_start|>x", [(256, 258, 120)]),
    ],
    ids=["text", "texts", "ids", "lists-of-ids", "special-in-text"],
)
def test_prompts_become_ids(served: Served, shared_engine: FakeEngine, prompt: Any, ids: Any) -> None:
    """BOS comes from the tokenizer's own post-processor, and not in front of ids."""
    shared_engine.seen.clear()
    assert served.post(COMPLETION, {"prompt": prompt}).status_code == 200
    assert [request.prompt for request in shared_engine.seen] == ids


def test_chat_has_one_bos(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.seen.clear()
    body = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
        ]
    }
    served.post(CHAT, body)
    expected = "<s><|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    (request,) = shared_engine.seen
    assert request.prompt.count(256) == 1
    assert served.post("/detokenize", {"tokens": request.prompt}).json()["prompt"] == expected
    assert request.params.max_tokens == 512 - len(request.prompt)


def test_final_message_is_continued(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.seen.clear()
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer "}]
    served.post(CHAT, {"messages": said, "continue_final_message": True, "add_generation_prompt": False})
    prompt = served.post("/detokenize", {"tokens": shared_engine.seen[0].prompt}).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\nThe answer ")


def test_parameters_reach_the_engine(served: Served, shared_engine: FakeEngine) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.2, "seed": 42, "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    more = {"logit_bias": {"5": -100, "6": 1}, "stop_token_ids": [9], "max_tokens": 4, "logprobs": 3}
    shared_engine.seen.clear()
    assert served.post(COMPLETION, {"prompt": "a", "n": 2, **given, **more}).status_code == 200
    first, second = (request.params for request in shared_engine.seen)
    expected = SamplingParams(
        max_tokens=4, logit_bias={5: -100.0, 6: 1.0}, stop_token_ids=frozenset({9}), logprobs=3, **given
    )
    assert first == expected
    assert second.seed == 43


def test_later_name_of_max_tokens_wins(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.seen.clear()
    served.post(CHAT, body_for(CHAT, max_tokens=50, max_completion_tokens=5))
    assert shared_engine.seen[0].params.max_tokens == 5


def test_scoring_as_lm_eval_does_it(served: Served, shared_engine: FakeEngine) -> None:
    """A batch of ids, echo, one token, and no probability for the first position."""
    shared_engine.script = says("!!")
    body = {
        "prompt": [[97, 98, 99], [100, 101]],
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1,
    }
    choices = served.post(COMPLETION, body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["abc!", "de!"]
    for choice, length in zip(choices, (4, 3), strict=True):
        scores = choice["logprobs"]
        assert {len(values) for values in scores.values()} == {length}
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        for score, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
            assert score == max(top.values())
        assert scores["text_offset"] == list(range(length))
        assert "".join(scores["tokens"]) == choice["text"]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_scoring_without_generating(
    served: Served, shared_engine: FakeEngine, logprobs: int | None, stream: bool
) -> None:
    body = {"prompt": "é👍", "max_tokens": 0, "echo": True, "logprobs": logprobs}
    if stream:
        text, reasons, scores = joined(served.events(COMPLETION, body))
    else:
        (choice,) = served.post(COMPLETION, body).json()["choices"]
        text, reasons, scores = choice["text"], [choice["finish_reason"]], [choice["logprobs"]]
    assert (text, reasons) == ("é👍", ["length"])
    if logprobs is not None:
        assert scores[0]["tokens"][:2] == ["<s>", "bytes:\\xc3"]
        assert scores[0]["text_offset"] == [0, 0, 0, 1, 1, 1, 1]


def test_chat_logprobs_spell_the_answer(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = says("né")
    body = body_for(CHAT, logprobs=True, top_logprobs=2)
    (choice,) = served.post(CHAT, body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert (
        bytes(byte for token in content for byte in token["bytes"]).decode() == choice["message"]["content"]
    )
    assert content[0] == {
        "token": "n", "logprob": -0.5, "bytes": [110],
        "top_logprobs": [
            {"token": "n", "logprob": -0.5, "bytes": [110]},
            {"token": "o", "logprob": -1.5, "bytes": [111]},
        ],
    }  # fmt: skip


def test_ignored_parameters_are_named(served: Served) -> None:
    extra = {"user": "me", "store": True, "metadata": {}, "service_tier": None, "x\r\ny": 1, "tools": []}
    options = {"stream_options": {"include_obfuscation": True}}
    answer = served.post(CHAT, body_for(CHAT, **extra, **options))
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "user,store,metadata,?,stream_options.include_obfuscation"
    assert (
        "x-ignored-params" not in served.post(CHAT, body_for(CHAT, response_format={"type": "text"})).headers
    )


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-123", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("<x>", False)],
    ids=["plain", "longest", "too-long", "space", "markup"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/nope", "/readyz"])
def test_request_id(served: Served, sent: str, kept: bool, path: str) -> None:
    answered = served.client.get(path, headers={"X-Request-Id": sent}).headers["x-request-id"]
    assert (answered == sent) == kept
    assert answered


def test_stream_headers(served: Served) -> None:
    headers = served.post(CHAT, body_for(CHAT, stream=True)).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_tokenize_and_back(served: Served) -> None:
    answer = served.post("/tokenize", {"prompt": UTF8, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"]) == len(UTF8.encode())
    assert served.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": UTF8}
    chat = served.post("/tokenize", {"messages": [{"role": "user", "content": "u"}]}).json()
    assert served.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"].endswith("assistant\n")
    info = served.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "<|im_end|>")
    assert "im_start" in info["chat_template"]


def test_models(served: Served) -> None:
    (card,) = served.client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"], card["context_length"]) == (
        "tiny",
        "model",
        512,
        512,
    )
    assert card["meta"]["quantization"]["scheme"] == "awq w4a16 g64 asymmetric"
    assert served.client.get("/v1/models/tiny").json() == card


def test_several_names(engine: FakeEngine) -> None:
    with serving(engine, served_model_name=("main", "org/other")) as served:
        assert [card["id"] for card in served.client.get("/v1/models").json()["data"]] == [
            "main",
            "org/other",
        ]
        assert served.client.get("/v1/models/org/other").status_code == 200
        for name in ("main", "org/other", None):
            answer = served.post(COMPLETION, {"prompt": "a", "model": name})
            assert answer.json()["model"] == (name or "main")
        assert served.post(COMPLETION, {"prompt": "a", "model": "tiny"}).status_code == 404


@pytest.mark.parametrize("route", [COMPLETION, CHAT])
def test_impossible_tokens_have_a_finite_logprob(
    served: Served, shared_engine: FakeEngine, route: str
) -> None:
    """JSON cannot carry minus infinity."""

    def script(request: Request) -> Iterator[Delta]:
        scores = TokenLogprob(97, -math.inf, ((97, -math.inf), (98, math.nan)))
        yield Delta(time.monotonic(), 97, scores, "length")

    shared_engine.script = script
    extra = {"logprobs": 2} if route == COMPLETION else {"logprobs": True, "top_logprobs": 2}
    answer = served.post(route, body_for(route, **extra))
    (choice,) = answer.json()["choices"]
    if route == COMPLETION:
        assert choice["logprobs"]["token_logprobs"] == [-9999.0]
        assert choice["logprobs"]["top_logprobs"] == [{"a": -9999.0, "b": -9999.0}]
    else:
        assert [top["logprob"] for top in choice["logprobs"]["content"][0]["top_logprobs"]] == [
            -9999.0,
            -9999.0,
        ]
