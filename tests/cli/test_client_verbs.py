"""`bench`, `chat` and `health` against the real HTTP server on a pretended engine."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble import cli
from support_process import ANSWER, fake_server

KEY = "s3cret"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fake_server(tmp_path_factory.mktemp("tiny"), pause=0.005, keys=(KEY,)) as url:
        yield url


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_bench_counts_every_token(
    address: str, chat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    sizes = ["--requests", "5", "--max-tokens", "12", "--prompt-tokens", "8", "--json", str(out)]
    streams = ["--concurrency", "1", "--concurrency", "4"]
    assert cli.main(["bench", address, *sizes, *streams, *(["--chat"] if chat else [])]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["model"], result["endpoint"]) == ("tiny", "chat" if chat else "completions")
    assert result["ignore_eos"] is True
    assert result["machine"]["versions"]["nybble"]
    assert [each["concurrency"] for each in result["rounds"]] == [1, 4]
    for each in result["rounds"]:
        assert (each["requests"], each["failed"], each["tokens"]) == (5, 0, 60)
        assert each["prompt_tokens"] > 8
        assert 0 < each["inter_token_ms"]["p50"] <= each["inter_token_ms"]["p99"]
        assert each["total_rate"] == pytest.approx(60 / each["wall_seconds"])
        assert each["inter_token_ms"]["p50"] > 3, "the engine takes 5 ms a token; something holds chunks back"
    assert "tiny at http://127.0.0.1" in capsys.readouterr().out


def test_bench_prints_json_on_request(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--requests", "1", "--max-tokens", "2", "--prompt-tokens", "4", "--concurrency", "1"]
    assert cli.main(["bench", address + "/v1/", *short, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"][0]["tokens"] == 2


def test_bench_says_that_a_key_is_missing(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert cli.main(["bench", address]) == 2
    assert "the server wants a key\nhint: give it with --api-key" in capsys.readouterr().err


def test_bench_says_why_the_server_refuses(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", address, "--model", "nobody"]) == 2
    assert "HTTP 404: The model 'nobody' does not exist" in capsys.readouterr().err
    assert cli.main(["bench", address, "--prompt-tokens", "5000"]) == 2
    assert "maximum context length is 512 tokens" in capsys.readouterr().err


def test_chat_streams_answers_and_tells_their_speed(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/reset\n/what\n\nAgain\n/exit\nnever sent\n"))
    assert cli.main(["chat", address, "--max-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert out == 2 * (ANSWER[:9] + "\n")
    assert err.count("9 tokens, first after") == 2
    assert err.count("cut at --max-tokens") == 2
    assert "/reset forgets" in err


def test_chat_without_a_person_fails_on_the_first_refusal(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 3000 + "\n"))
    assert cli.main(["chat", address]) == 2
    assert "maximum context length" in capsys.readouterr().err


def test_health_follows_readiness(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", address]) == 0
    assert "ready" in capsys.readouterr().out
    assert cli.main(["health", "http://127.0.0.1:9"]) == 1
    assert "not reachable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("0.0.0.0", "9000", "http://127.0.0.1:9000"),
        ("::", "8000", "http://[::1]:8000"),
        ("10.1.2.3", "tcp://10.0.0.1:8000", "http://10.1.2.3:8000"),
    ],
)
def test_clients_find_the_server_by_its_own_settings(
    monkeypatch: pytest.MonkeyPatch, host: str, port: str, expected: str
) -> None:
    from nybble.commands.address import base_url

    monkeypatch.setenv("NYBBLE_HOST", host)
    monkeypatch.setenv("NYBBLE_PORT", port)
    assert base_url(None) == expected
