"""Banner, progress and log lines: for people on a terminal, for programs elsewhere."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from nybble import banner, log, progress, terminal
from nybble.config import ServeConfig
from support_engine import FakeEngine

INFO = FakeEngine(Path("/nowhere")).info


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal that records what it shows."""
    shown = Console(force_terminal=True, width=100, record=True, color_system=None)
    for module in (terminal, banner, progress, log):
        monkeypatch.setattr(module, "console", lambda: shown)
    return shown


@pytest.fixture
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_banner_for_programs_is_one_line_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.cache_clear()
    banner.show(INFO, ServeConfig(api_key=("s3cret",)), ("tiny model",), "http://127.0.0.1:8000")
    (line,) = capsys.readouterr().err.splitlines()
    word, *pairs = shlex.split(line)
    values = dict(pair.split("=", 1) for pair in pairs)
    assert word == "ready"
    assert values["model"] == "tiny model"
    assert values["quantization"] == "awq w4a16 g64 asymmetric"
    assert (values["kv_tokens"], values["auth"], values["url"]) == ("1024", "on", "http://127.0.0.1:8000")
    assert "s3cret" not in line
    terminal.console.cache_clear()


@pytest.mark.parametrize(
    ("config", "auth"),
    [
        (ServeConfig(), "off: only this machine"),
        (ServeConfig(host="0.0.0.0"), "off: anyone who reaches"),
        (ServeConfig(api_key=("s3cret",)), "on: clients must send a key"),
    ],
    ids=["local", "open", "key"],
)
def test_banner_for_people_says_who_may_come_in(person: Console, config: ServeConfig, auth: str) -> None:
    banner.show(INFO, config, ("tiny[1]",), "http://127.0.0.1:8000")
    text = person.export_text()
    assert auth in text
    assert "tiny[1] (llama" in text, "names are not markup"
    assert "http://127.0.0.1:8000/metrics" in text
    assert "s3cret" not in text


def test_lines_come_once_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Lines() as shown:
        for step in range(101):
            shown.update("quantize", step / 100)
        shown.update("write", 0.0)
        shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"quantize: {tenth * 10}%" for tenth in range(11)] + ["write: 0%"]


def test_lines_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 0.0, 5.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Lines() as shown:
        shown.update("quantize", 0.0)
        shown.update("quantize", 0.25)
    assert capsys.readouterr().err.splitlines()[-1] == "quantize: 20%, about 15 s left"


def test_bars_complete_each_phase(person: Console) -> None:
    with progress.Bars() as shown:
        shown.update("fetch", 0.5)
        shown.update("load", 0.5)
        shown.close()
    lines = person.export_text().splitlines()
    assert any(line.startswith("fetch") and "100%" in line for line in lines)
    assert any(line.startswith("load") and "100%" in line for line in lines)


def test_log_lines_are_json_where_nobody_watches(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.cache_clear()
    log.configure("info")
    logging.getLogger("nybble.api").info("took %d ms", 5, extra={"request_id": "r1"})
    logging.getLogger("nybble.api").debug("not shown")
    logging.getLogger("httpx2").info("not shown either")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("info", "nybble.api", "took 5 ms")
    assert entry["request_id"] == "r1"
    assert set(entry) == {"time", "level", "logger", "message", "request_id"}
    terminal.console.cache_clear()


def test_tracebacks_are_kept_in_json() -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        record = logging.LogRecord(
            "n", logging.ERROR, "f", 1, "m", (), (type(error), error, error.__traceback__)
        )
    assert "ValueError: why" in json.loads(log.JsonFormatter().format(record))["traceback"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (96_600_000, "96.6 MB"), (2.5e12, "2.5 TB")],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert terminal.size(count) == text
