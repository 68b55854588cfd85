"""`nybble serve` from its first line to its last, on a pretended engine."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support_process import environment

PROGRAM = """
import sys, time
from pathlib import Path
import nybble.api.app as app
from nybble.errors import CheckpointError
from support_engine import FakeEngine, byte_tokenizer

def build(config, progress):
    if config.model == "broken":
        raise CheckpointError("w.safetensors: cut short", hint="download it again")
    if config.model == "slow":
        try:
            while True:
                progress("load", 0.0)
                time.sleep(0.1)
        finally:
            print("cleaned up", file=sys.stderr, flush=True)
    if config.model == "deaf":
        time.sleep(60)
    progress("load", 0.0)
    progress("load", 1.0)
    return FakeEngine(byte_tokenizer(Path(sys.argv[1])))

app.build_engine = build
from nybble.cli import main
sys.exit(main(sys.argv[2:]))
"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `nybble serve` with these arguments and variables; what still runs at the end is killed."""
    with ExitStack() as stack:

        def run(*arguments: str, **extra: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", PROGRAM, str(tmp_path), "serve", *arguments]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**extra))
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def until(process: subprocess.Popen[str], word: str) -> list[str]:
    """The lines of standard error up to the first that holds `word`."""
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if word in line:
            return lines
    raise AssertionError("\n".join(lines))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def get(url: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def patiently(url: str) -> tuple[int, dict[str, object]]:
    """The port is bound a moment before it accepts."""
    for _ in range(50):
        with suppress(urllib.error.URLError):
            return get(url)
        time.sleep(0.1)
    return get(url)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_it_listens_then_loads_then_says_so_then_leaves(start: Start, number: signal.Signals) -> None:
    process = start("tiny", "--port", "0", "--max-n", "3", NYBBLE_SERVED_MODEL_NAME="mine,other")
    lines = until(process, "ready version=")
    listening = json.loads(lines[0])["message"]
    facts = dict(pair.split("=", 1) for pair in shlex.split(lines[-1])[1:])
    assert listening == f"listening on {facts['url']}, not ready yet"
    assert lines[1:-1] == ["load: 0%", "load: 100%"]
    assert get(facts["url"] + "/readyz") == (200, {"status": "ready"})
    _, listed = get(facts["url"] + "/v1/models")
    assert [card["id"] for card in listed["data"]] == ["mine", "other"]  # type: ignore[attr-defined]
    process.send_signal(number)
    code, _ = finish(process)
    assert code == 0


def test_probes_answer_while_it_loads(start: Start) -> None:
    process = start("slow", "--port", "0")
    url = json.loads(until(process, "listening")[-1])["message"].split()[2].rstrip(",")
    status, answer = patiently(url + "/readyz")
    assert (status, answer["status"]) == (503, "loading")
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 0
    assert "cleaned up" in err, "an abandoned build gets to remove what it began"
    assert "Traceback" not in err


def test_a_build_that_does_not_listen_is_left_behind(start: Start) -> None:
    process = start("deaf", "--port", "0")
    until(process, "listening")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process)
    assert code == 0


def test_what_fails_while_loading_is_two_lines(start: Start) -> None:
    code, err = finish(start("broken", "--port", "0"))
    assert code == 2
    assert err.splitlines()[-2:] == ["error: w.safetensors: cut short", "hint: download it again"]
    assert "Traceback" not in err


def test_a_port_in_use_is_two_lines(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, err = finish(start("--port", port))
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert second.startswith("hint: ")
