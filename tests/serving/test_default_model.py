"""The real default model behind the real server, talked to with the official client.

The model is fetched and quantized into the user's cache on the first run, as `make serve` does it, but to the
nearest in groups of 32: its own weights lie on such a grid, so that takes seconds and loses nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from support_server import Server, running

pytestmark = pytest.mark.timeout(900)

MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("default") / "log"
    quick = ("--quantization", "rtn", "--group-size", "32")
    with running("default", log, *quick, ready_within=840) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def test_it_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_streamed_chat_knows_paris(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_stream_and_whole_are_one_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**settings)
    parts = client.chat.completions.create(**settings, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
    assert text == whole.choices[0].message.content


def test_logprobs_of_an_echo_sum_to_a_likely_sentence(client: openai.OpenAI) -> None:
    def score(text: str) -> float:
        done = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1)
        scores = done.choices[0].logprobs
        assert scores is not None and scores.token_logprobs is not None
        return sum(value for value in scores.token_logprobs if value is not None)

    assert score("The sun rises in the east.") > score("The sun rises in the fish.") + 2


def test_metrics_saw_it(server: Server, client: openai.OpenAI) -> None:
    unending = {"ignore_eos": True}
    client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=16, extra_body=unending)
    assert server.metric("nybble_generation_tokens_total") >= 16
    assert 0 < server.metric("nybble_decode_bandwidth_utilization_ratio") < 1.5
    assert server.metric("vllm:generation_tokens_total") == server.metric("nybble_generation_tokens_total")


def test_bench_measures_it(server: Server, tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    command = [sys.executable, "-m", "nybble", "bench", server.url, "--concurrency", "1", "--requests", "2"]
    done = subprocess.run(
        [*command, "--max-tokens", "16", "--prompt-tokens", "16", "--json", str(result)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(result.read_text())
