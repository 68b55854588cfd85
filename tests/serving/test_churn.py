"""Clients come, go and vanish: nothing leaks, and nobody's answer changes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import httpx2
import orjson
import pytest

from support_checkpoint import write_checkpoint
from support_server import Server, running

REQUESTS, CONCURRENCY, LEAVING = 200, 16, 0.3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("churn")
    flags = (
        "--kv-cache-tokens",
        "1024",
        "--max-num-batched-tokens",
        "64",
        "--threads",
        "1",
        "--kernels",
        "torch",
    )
    with running(str(write_checkpoint(folder / "tiny")), folder / "log", *flags) as started:
        yield started


def body(index: int, stream: bool) -> dict[str, object]:
    chance = random.Random(index)
    shared = "The quick brown fox jumps over the lazy dog. " if index % 3 else ""
    prompt = shared + "".join(chance.choice("abcdefghij ") for _ in range(chance.randrange(1, 40)))
    return {
        "model": "tiny", "prompt": prompt, "max_tokens": 4 + index % 24, "temperature": 0, "stream": stream,
        "ignore_eos": True, "logprobs": 0,
    }  # fmt: skip


async def answer(client: httpx2.AsyncClient, index: int, leave_after: int | None) -> list[str] | None:
    """The tokens of one request; None when the client left on the way."""
    stream = index % 2 == 0
    if not stream:
        call = client.post("/v1/completions", json=body(index, False))
        if leave_after is None:
            response = await call
            assert response.status_code == 200, response.text
            return list(response.json()["choices"][0]["logprobs"]["tokens"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.002 * leave_after)
            raise TimeoutError  # it was faster than we left
        return None
    tokens: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body(index, True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = orjson.loads(line[6:])["choices"]
                tokens += [t for c in choices if c["logprobs"] for t in c["logprobs"]["tokens"]]
            if leave_after is not None and len(tokens) >= leave_after:
                return None
    return tokens


async def storm(url: str) -> dict[int, list[str]]:
    gate, chance = asyncio.Semaphore(CONCURRENCY), random.Random(0)
    leaving = [chance.randrange(0, 12) if chance.random() < LEAVING else None for _ in range(REQUESTS)]
    completed: dict[int, list[str]] = {}
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:

        async def one(index: int) -> None:
            async with gate:
                tokens = await answer(client, index, leaving[index])
                if tokens is not None:
                    completed[index] = tokens

        await asyncio.gather(*(one(i) for i in range(REQUESTS)))
    return completed


async def alone(url: str, indices: list[int]) -> dict[int, list[str]]:
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        return {i: await answer(client, i, None) or [] for i in indices}


def test_churn_leaks_nothing_and_changes_no_answer(server: Server) -> None:
    completed = asyncio.run(storm(server.url))
    deadline = time.monotonic() + 10
    gauges = ('nybble_kv_blocks{state="live"', "nybble_requests_running", "nybble_requests_waiting")
    while time.monotonic() < deadline and any(server.metric(g) for g in gauges):
        time.sleep(0.05)
    assert [server.metric(g) for g in gauges] == [0, 0, 0]
    assert server.process.poll() is None
    assert 100 < len(completed) < REQUESTS
    assert all(len(tokens) == 4 + i % 24 for i, tokens in completed.items())
    solo = asyncio.run(alone(server.url, sorted(completed)))
    assert solo == completed
