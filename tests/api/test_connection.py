"""Clients that leave, stall or are slow; engines that fail: nothing stays behind, and everyone is told."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nybble.engine.request import Delta, Request
from nybble.errors import EngineStopped, InvalidRequest, QueueFull
from support_engine import FakeEngine, expecting_aborts, says
from support_http import Served, eventually, request_bytes, serving

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": ["a", "b"], "max_tokens": 300},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "n": 2},
}


@pytest.mark.parametrize("after", [0, 1, 20], ids=["before-headers", "first-token", "mid-stream"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", BODIES)
def test_disconnect_frees_the_engine(
    served: Served, shared_engine: FakeEngine, route: str, stream: bool, after: int
) -> None:
    shared_engine.script = says("abc " * 100, pause=0.02 if after else 0.3)
    with expecting_aborts(shared_engine, 2), served.connection() as sock:
        sock.sendall(request_bytes(route, {**BODIES[route], "stream": stream}))
        if stream and after:
            read_until(sock, b"\n\n", after)
        else:
            eventually(lambda: shared_engine.stats().running == 2)


def test_disconnect_is_counted(served: Served, shared_engine: FakeEngine) -> None:
    sample = 'nybble_http_requests_total{handler="/v1/completions",method="POST",status="499"}'
    before = served.metric('nybble_requests_finished_total{reason="abort"}')
    shared_engine.script = says("abc " * 100, pause=0.05)
    with expecting_aborts(shared_engine, 2), served.connection() as sock:
        sock.sendall(request_bytes(COMPLETION, BODIES[COMPLETION]))
        eventually(lambda: shared_engine.stats().running == 2)
    eventually(lambda: served.metric('nybble_requests_finished_total{reason="abort"}') == before + 2)
    assert served.metric(sample) >= 1


def test_kept_connection_serves_again(served: Served, shared_engine: FakeEngine) -> None:
    """The watch for a disconnect must not eat the next request."""
    shared_engine.script = says("abc")
    with served.connection() as sock:
        for stream in (True, False, True):
            sock.sendall(request_bytes(COMPLETION, {"prompt": "a", "stream": stream}))
            assert b"200 OK" in read_until(sock, b"0\r\n\r\n" if stream else b'cached_tokens":0}}}', 1)


def test_pipelined_requests_are_answered_in_turn(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = says("abc", pause=0.02)
    with served.connection() as sock:
        sock.sendall(request_bytes(COMPLETION, {"prompt": "a"}) * 2)
        read_until(sock, b'cached_tokens":0}}}', 2)


def test_silence_is_filled_with_comments(engine: FakeEngine) -> None:
    engine.script = says("ab", pause=0.35)
    with serving(engine, keep_alive=0.1) as served:
        text = served.post(CHAT, {**BODIES[CHAT], "n": 1, "stream": True}).text
        assert text.startswith(": keep-alive\n\n")
        assert 4 <= text.count(": keep-alive\n\n") <= 12
        assert text.endswith("data: [DONE]\n\n")


def fails_after(count: int, how: Delta) -> Any:
    def script(request: Request) -> Iterator[Delta]:
        for _ in range(count):
            yield Delta(time.monotonic(), 97)
            time.sleep(0.02)
        yield how

    return script


ERROR = Delta(0.0, finish="error", error="the logits are not numbers")
ABORT = Delta(0.0, finish="abort")


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [(ERROR, 500, "request_failed"), (ABORT, 503, "engine_stopped")],
    ids=["error", "abort"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_failure_before_the_first_token_has_a_status(
    served: Served, shared_engine: FakeEngine, how: Delta, status: int, code: str, stream: bool
) -> None:
    shared_engine.script = fails_after(0, how)
    answer = served.post(COMPLETION, {"prompt": "a", "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) == (status == 503)


def test_official_client_streams_a_chat(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = says("Bonjour, été 👍")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        model = client.models.list().data[0].id
        options: Any = {"include_usage": True}
        messages: Any = [{"role": "user", "content": "hi"}]
        chunks = list(
            client.chat.completions.create(
                model=model, messages=messages, stream=True, stream_options=options
            )
        )
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=model, messages=messages, max_tokens=10**6)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Bonjour, été 👍"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(text.encode())
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("how", [ERROR, ABORT], ids=["error", "abort"])
@pytest.mark.parametrize("route", BODIES)
def test_failure_in_a_stream_raises_in_the_client(
    served: Served, shared_engine: FakeEngine, route: str, how: Delta
) -> None:
    shared_engine.script = fails_after(3, how)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    got = 0
    with client, pytest.raises(openai.APIError) as caught:
        create: Any = client.completions.create if route == COMPLETION else client.chat.completions.create
        body = {**BODIES[route], "n": 1}
        for _ in create(model="tiny", stream=True, **body):
            got += 1
    assert got >= 3
    assert caught.value.code in ("request_failed", "engine_stopped")


def test_failure_in_a_stream_has_no_clean_end(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = fails_after(3, ERROR)
    text = served.post(COMPLETION, {"prompt": "a", "stream": True}).text
    assert '"code":"request_failed"' in text.split("\n\n")[-2]
    assert "[DONE]" not in text and '"finish_reason":"' not in text


def test_failing_choice_ends_its_neighbours(served: Served, shared_engine: FakeEngine) -> None:
    """One request fails as a whole; what it still had running is freed."""
    shared_engine.script = lambda r: (
        fails_after(1, ERROR) if r.prompt[-1] == 97 else says("b" * 200, pause=0.02)
    )(r)
    with expecting_aborts(shared_engine, 1):
        assert served.post(COMPLETION, {"prompt": ["b", "a"], "max_tokens": 200}).status_code == 500


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFull("The queue is full."), 503),
        (EngineStopped("It stopped."), 503),
        (InvalidRequest("No."), 400),
    ],
    ids=["queue-full", "stopped", "invalid"],
)
def test_engine_may_refuse(engine: FakeEngine, error: Exception, status: int, stream: bool) -> None:
    with serving(engine) as served:
        engine.refuse = error
        answer = served.post(CHAT, {**BODIES[CHAT], "stream": stream})
        assert answer.status_code == status
        assert ("retry-after" in answer.headers) == (status == 503)


def test_bug_in_the_engine_is_a_plain_500(engine: FakeEngine) -> None:
    with serving(engine) as served:
        engine.refuse = RuntimeError("secret")
        answer = served.post(CHAT, BODIES[CHAT], headers={"X-Request-Id": "mine"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost:"], ids=["nothing", "half-a-header"]
)
def test_slow_headers_lose_the_socket(engine: FakeEngine, sent: bytes) -> None:
    with serving(engine, header_timeout=0.3) as served, served.connection() as sock:
        sock.sendall(sent)
        began = time.monotonic()
        assert sock.recv(100) == b""
        assert 0.2 < time.monotonic() - began < 2


def test_slow_headers_of_a_later_request(engine: FakeEngine) -> None:
    """An idle connection stays open, a dribbling one does not."""
    with serving(engine, header_timeout=0.3) as served, served.connection() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(sock, b"}", 1)
        time.sleep(0.6)
        sock.sendall(b"GET /version HTTP/1.1\r\nHost:")
        began = time.monotonic()
        assert sock.recv(100) == b""
        assert time.monotonic() - began < 2


def test_slow_body_is_refused(engine: FakeEngine) -> None:
    with serving(engine, body_timeout=0.3) as served, served.connection() as sock:
        sock.sendall(request_bytes(COMPLETION, {"prompt": "a"})[:-3])
        assert read_until(sock, b"}}", 1).startswith(b"HTTP/1.1 408 ")


def test_header_timeout_does_not_cut_a_long_answer(engine: FakeEngine) -> None:
    engine.script = says("abc", pause=0.2)
    with serving(engine, header_timeout=0.2, body_timeout=0.2) as served:
        assert served.post(COMPLETION, {"prompt": "a"}).json()["choices"][0]["text"] == "abc"


def read_until(sock: socket.socket, mark: bytes, times: int) -> bytes:
    got = b""
    while got.count(mark) < times:
        part = sock.recv(65536)
        assert part, got
        got += part
    return got
