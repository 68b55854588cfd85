"""Every route times every hostile input: the answer is a short 4xx in OpenAI's shape."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from support_engine import FakeEngine
from support_http import Served, request_bytes

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = (COMPLETION, CHAT, "/tokenize", "/detokenize")
VALID: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": "hi"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}

RAW = {
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"temperature": 1e999}',
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "bad-utf8": b'{"prompt": "\xff\xfe"}',
    "lone-surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "nested-arrays": b"[" * 100_000 + b"]" * 100_000,
    "nested-objects": b'{"a":' * 990 + b"1" + b"}" * 990,
    "array": b"[]",
    "null": b"null",
    "number": b"3",
    "empty": b"",
    "cut": b'{"prompt": "a',
    "bom": b"\xef\xbb\xbf{}",
    "too-large": b'{"prompt": "' + b"a" * 400_000 + b'"}',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00",
    "nothing-known": b'{"x": 1}',
}

SHARED: dict[str, dict[str, Any]] = {
    "temperature-text": {"temperature": "hot"},
    "temperature-high": {"temperature": 2.1},
    "temperature-bool": {"temperature": True},
    "top_p-zero": {"top_p": 0},
    "top_p-high": {"top_p": 1.5},
    "top_k-low": {"top_k": -2},
    "min_p": {"min_p": -0.1},
    "presence": {"presence_penalty": 3},
    "frequency": {"frequency_penalty": -3},
    "repetition": {"repetition_penalty": 0},
    "n-zero": {"n": 0},
    "n-huge": {"n": 10**9},
    "n-int64": {"n": 2**63},
    "max_tokens-negative": {"max_tokens": -1},
    "max_tokens-zero": {"max_tokens": 0},
    "max_tokens-int64": {"max_tokens": 2**63},
    "max_tokens-room": {"max_tokens": 100_000},
    "max_tokens-text": {"max_tokens": "5"},
    "min_tokens": {"max_tokens": 2, "min_tokens": 3},
    "seed-huge": {"seed": 2**64},
    "stop-many": {"stop": ["a"] * 17},
    "stop-flood": {"stop": ["a"] * 20_000},
    "stop-empty": {"stop": [""]},
    "stop-long": {"stop": "a" * 2000},
    "stop-number": {"stop": 5},
    "stop-object": {"stop": {"a": 1}},
    "bias-negative": {"logit_bias": {"-1": 1}},
    "bias-vocab": {"logit_bias": {"260": 1}},
    "bias-int32": {"logit_bias": {str(2**31): 1}},
    "bias-word": {"logit_bias": {"word": 1}},
    "bias-unicode-digit": {"logit_bias": {"٣": 1}},
    "bias-value": {"logit_bias": {"5": 101}},
    "bias-bool": {"logit_bias": {"5": True}},
    "bias-list": {"logit_bias": [1]},
    "bias-flood": {"logit_bias": {str(i): 1 for i in range(2000)}},
    "stop_token_ids-vocab": {"stop_token_ids": [260]},
    "stop_token_ids-negative": {"stop_token_ids": [-1]},
    "stop_token_ids-flood": {"stop_token_ids": [1] * 10_000},
    "stream-text": {"stream": "yes"},
    "stream_options": {"stream_options": 5},
    "model": {"model": "nope"},
    "model-long": {"model": "m" * 10_000},
    "model-number": {"model": 5},
}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "prompt-number": {"prompt": 5},
    "prompt-null": {"prompt": None},
    "prompt-object": {"prompt": {"a": 1}},
    "prompt-no-list": {"prompt": []},
    "prompt-empty-ids": {"prompt": [[]]},
    "prompt-mixed": {"prompt": ["a", [1]]},
    "prompt-mixed-ids": {"prompt": [1, "a"]},
    "prompt-floats": {"prompt": [1.5]},
    "prompt-bools": {"prompt": [True]},
    "prompt-deep": {"prompt": [[[1]]]},
    "prompt-flood": {"prompt": ["a"] * 10_000},
    "prompt-id-negative": {"prompt": [-1]},
    "prompt-id-vocab": {"prompt": [260]},
    "prompt-id-int32": {"prompt": [2**31]},
    "prompt-id-int63": {"prompt": [2**63]},
    "prompt-long": {"prompt": "a" * 600},
    "prompt-longer": {"prompt": "a" * 100_000},
    "prompt-ids-long": {"prompt": [1] * 600},
    "logprobs-huge": {"logprobs": 10**6},
    "logprobs-negative": {"logprobs": -1},
    "logprobs-bool": {"logprobs": True},
    "echo-text": {"echo": "yes"},
}

MESSAGE: dict[str, Any] = {"role": "user", "content": "hi"}
CHATS: dict[str, dict[str, Any]] = {
    "none": {"messages": []},
    "text": {"messages": "hi"},
    "numbers": {"messages": [1] * 50_000},
    "flood": {"messages": [MESSAGE] * 5000},
    "role": {"messages": [{"role": "wizard", "content": "hi"}]},
    "no-content": {"messages": [{"role": "user"}]},
    "content-number": {"messages": [{"role": "user", "content": 5}]},
    "image": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    },
    "part-text": {"messages": [{"role": "user", "content": ["hi"]}]},
    "part-null": {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
    "tool": {"messages": [{"role": "tool", "content": "hi", "tool_call_id": "x"}]},
    "tool-calls": {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
    "long": {"messages": [{"role": "user", "content": "a" * 600}]},
    "completion-tokens": {"max_completion_tokens": 0},
    "top_logprobs-alone": {"top_logprobs": 2},
    "top_logprobs-huge": {"logprobs": True, "top_logprobs": 1000},
    "logprobs-number": {"logprobs": 1},
    "continue": {"continue_final_message": True},
    "kwargs-list": {"chat_template_kwargs": []},
    "kwargs-tokenize": {"chat_template_kwargs": {"tokenize": True}},
    "kwargs-template": {"chat_template_kwargs": {"chat_template": "x"}},
    "kwargs-type": {"chat_template_kwargs": {"enable_thinking": "yes"}},
    "kwargs-long": {"chat_template_kwargs": {"date_string": "d" * 1000}},
}

UNSUPPORTED: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "functions": [{"name": "f"}],
    "suffix": "end",
    "best_of": 2,
    "audio": {"voice": "x"},
    "chat_template": "{{ 1 }}",
    "guided_json": {},
    "structured_outputs": {"regex": "(a+)+b"},
    "use_beam_search": True,
    "prompt_logprobs": 1,
    "prompt_embeds": "AAAA",
    "truncate_prompt_tokens": 5,
    "allowed_token_ids": [10**9],
    "bad_words": ["a"],
    "skip_special_tokens": False,
}


def table() -> list[Any]:
    rows = [
        (route, name, {**VALID[route], **extra})
        for route in (COMPLETION, CHAT)
        for name, extra in SHARED.items()
    ]
    rows += [(COMPLETION, name, {**VALID[COMPLETION], **extra}) for name, extra in COMPLETIONS.items()]
    rows += [(CHAT, name, {**VALID[CHAT], **extra}) for name, extra in CHATS.items()]
    rows += [
        (route, name, {**VALID[route], name: value})
        for route in ROUTES
        for name, value in UNSUPPORTED.items()
    ]
    rows += [("/tokenize", "both", {"prompt": "a", "messages": [MESSAGE]})]
    rows += [
        ("/detokenize", f"ids-{i}", {"tokens": v})
        for i, v in enumerate(([-1], [260], ["a"], "a", None, [True]))
    ]
    return [pytest.param(route, body, id=f"{route}-{name}") for route, name, body in rows]


def assert_refusal(status: int, content: bytes) -> dict[str, Any]:
    assert 400 <= status < 500, content[:300]
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 400
    assert "Traceback" not in error["message"] and "pydantic" not in error["message"]
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("route", "body"), table())
def test_bad_fields_are_refused(
    served: Served, shared_engine: FakeEngine, route: str, body: Any, stream: bool
) -> None:
    before = len(shared_engine.seen)
    began = time.monotonic()
    answer = served.post(route, {**body, "stream": True} if stream and "stream" not in body else body)
    assert_refusal(answer.status_code, answer.content)
    assert time.monotonic() - began < 2
    assert len(shared_engine.seen) == before


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("route", ROUTES)
def test_bad_bodies_are_refused(served: Served, route: str, name: str) -> None:
    answer = served.client.post(route, content=RAW[name], headers={"Content-Type": "application/json"})
    assert_refusal(answer.status_code, answer.content)
    assert answer.status_code == (413 if name == "too-large" else 400)
    assert "x-request-id" in answer.headers


@pytest.mark.parametrize(
    "type", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=x"]
)
@pytest.mark.parametrize("route", ROUTES)
def test_content_type_does_not_matter(served: Served, route: str, type: str) -> None:
    body = json.dumps(VALID[route]).encode()
    assert served.client.post(route, content=body, headers={"Content-Type": type}).status_code == 200


@pytest.mark.parametrize("name", [*UNSUPPORTED])
def test_refusal_names_the_parameter(served: Served, name: str) -> None:
    answer = served.post(CHAT, {**VALID[CHAT], name: UNSUPPORTED[name]})
    assert assert_refusal(answer.status_code, answer.content)["param"] == name


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        ({"messages": [MESSAGE], "temperature": 9}, "temperature"),
        ({"messages": [MESSAGE], "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({}, "messages"),
    ],
)
def test_param_is_the_path_of_the_field(served: Served, body: Any, param: str) -> None:
    answer = served.post(CHAT, body)
    assert assert_refusal(answer.status_code, answer.content)["param"] == param


def test_too_long_prompt_says_so_in_openais_words(served: Served) -> None:
    answer = served.post(COMPLETION, {"prompt": "a" * 509, "max_tokens": 3})
    error = assert_refusal(answer.status_code, answer.content)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(
        "This model's maximum context length is 512 tokens. However, you requested 513 "
    )


def test_prompt_that_just_fits(served: Served) -> None:
    assert served.post(COMPLETION, {"prompt": "a" * 508, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/../metrics/x", 404, "not_found"),
        ("GET", COMPLETION, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_unknown_places(served: Served, method: str, path: str, status: int, code: str) -> None:
    answer = served.client.request(method, path)
    assert answer.status_code == status
    assert assert_refusal(answer.status_code, answer.content)["code"] == code


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"Ab: cdef\r\n" * 20_000 + b"\r\n",
        b"GET //v1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET @x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=[
        "garbage",
        "long-header",
        "endless-header",
        "many-headers",
        "slashes",
        "at",
        "two-lengths",
        "negative",
    ],
)
def test_bad_http_is_refused_in_the_same_shape(served: Served, request_: bytes) -> None:
    with served.connection() as sock:
        with contextlib.suppress(ConnectionError):  # the server need not read all of it
            sock.sendall(request_)
        answer = _read_all(sock)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 431 ")
    assert_refusal(400, content)


def test_declared_length_is_refused_before_the_body_comes(served: Served) -> None:
    with served.connection() as sock:
        sock.sendall(
            request_bytes(COMPLETION, b"").replace(b"Content-Length: 0", b"Content-Length: 99999999")
        )
        assert _read_all(sock).startswith(b"HTTP/1.1 413 ")


def test_chunked_body_is_measured(served: Served) -> None:
    with served.connection() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"".join([b"400\r\n" + b"a" * 1024 + b"\r\n"] * 400) + b"0\r\n\r\n")
        assert _read_all(sock).startswith(b"HTTP/1.1 413 ")


def _read_all(sock: Any) -> bytes:
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
