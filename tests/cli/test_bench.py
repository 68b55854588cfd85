"""The arithmetic of a measurement, and that no chunk is counted twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from nybble.bench.client import RequestRefused, Sample, Target, ask
from nybble.bench.load import Round, settle
from nybble.bench.summary import quantile, summarize
from nybble.bench.words import prompt

TARGET = Target("http://server", "m", chat=True, max_tokens=4)
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
STREAM = (
    b': ping\n\ndata: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\nda',
    b'ta: {"choices":[{"index":0,"delta":{"content":"b"}}]}\r\n\r\n',
    b'data:{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n',
    USAGE,
    b"data: [DONE]\n\n",
)


def answer(*pieces: bytes, status: int = 200) -> httpx2.MockTransport:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0.002)
            yield piece

    return httpx2.MockTransport(lambda request: httpx2.Response(status, content=body()))


async def asked(transport: httpx2.MockTransport) -> Sample:
    async with httpx2.AsyncClient(transport=transport) as client:
        return await ask(client, TARGET, "hello")


async def test_only_chunks_with_text_count_and_tokens_come_from_usage() -> None:
    sample = await asked(answer(*STREAM))
    assert len(sample.arrivals) == 2
    assert (sample.tokens, sample.prompt_tokens, sample.finish) == (3, 7, "stop")
    assert sample.first >= 0.004, "the role chunk is not the first token"
    assert len(sample.gaps) == 1


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        pytest.param([b'{"error":{"message":"no such model"}}'], 404, "no such model", id="refused"),
        pytest.param([b"<html>Bad Gateway"], 502, "<html>Bad Gateway", id="not JSON"),
        pytest.param(
            [STREAM[1][:-2], b'data: {"error":{"message":"engine died"}}\n\n'],
            200,
            "engine died",
            id="midway",
        ),
        pytest.param([USAGE], 200, "the answer is empty", id="empty"),
    ],
)
async def test_what_is_not_an_answer_is_refused(pieces: list[bytes], status: int, message: str) -> None:
    with pytest.raises(RequestRefused, match=message) as caught:
        await asked(answer(*pieces, status=status))
    assert caught.value.status == status


async def test_a_server_that_refuses_ignore_eos_is_asked_without() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response:
        refused = b"ignore_eos" in request.content
        return httpx2.Response(400 if refused else 200, content=b"{}" if refused else b"".join(STREAM))

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(respond)) as client:
        settled = await settle(client, TARGET, 4)
    assert settled.extras == {}
    assert settled.max_tokens == TARGET.max_tokens


def test_summary_of_two_streams() -> None:
    slow = Sample(sent=0.0, arrivals=(0.1, 0.2, 0.3), prompt_tokens=10, tokens=3)
    fast = Sample(sent=0.0, arrivals=(0.3, 0.4), prompt_tokens=20, tokens=5)
    found = summarize(Round(2, (slow, fast), ("broke",), 0.5))
    assert (found.requests, found.failed, found.tokens, found.prompt_tokens) == (2, 1, 8, 15)
    assert found.first_token_ms["p50"] == pytest.approx(200)
    assert found.inter_token_ms["p99"] == pytest.approx(100)
    assert found.stream_rate == pytest.approx((10 + 40) / 2)
    assert (found.total_rate, found.requests_per_second) == (pytest.approx(16), pytest.approx(4))


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([], 0.5, 0.0), ([3.0], 0.99, 3.0), ([2.0, 1.0], 0.5, 1.5), ([4.0, 1.0, 2.0], 1.0, 4.0)],
)
def test_quantile_is_linear_between_ranks(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == pytest.approx(expected)


def test_a_stream_of_one_token_has_no_rate() -> None:
    assert Sample(0.0, (0.1,), 1, 1).rate is None


def test_prompts_are_repeatable_and_differ_from_the_start() -> None:
    assert prompt(50, 1) == prompt(50, 1)
    assert len(prompt(50, 1).split()) == 50
    assert len({prompt(50, seed).split()[0] + prompt(50, seed).split()[1] for seed in range(20)}) > 15
