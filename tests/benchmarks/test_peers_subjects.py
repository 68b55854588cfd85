"""Subjects of benchmarks/peers as processes: at rest they do nothing, and what fails is named."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from measuring import BEFORE, Amount, InProcess, OverHttp, differing
from processes import Process, Worker, group
from rounds import Rounds
from subjects import PORT, Library, Server
from texts import EXPECTED, Texts
from wire import Failed

from support_engine import byte_tokenizer
from support_process import ROOT

SSE = str(ROOT / "tests" / "support_sse.py")
LINES = """
import sys
import threading
sys.path.insert(0, {folder!r})
from worker_lines import answer
def fail():
    raise ValueError("no\\nroom")
def decode(prompt, tokens, pause=0.01):
    return {{"gaps": [pause] * (tokens - 1), "ids": [*b" Paris"]}}
verbs = {{"decode": decode, "prefill": lambda prompt: 0.25, "fail": fail, "exit": lambda: sys.exit(3)}}
def begin():
    print("to the log", flush=True)
    threading.Thread(target=spin, daemon=True).start()
def spin():
    while True:
        pass
verbs["spin"] = begin
answer(lambda: ({{"kind": "test"}}, verbs))
"""


def worker_command(folder: Path) -> tuple[str, ...]:
    script = folder / "worker.py"
    script.write_text(LINES.format(folder=str(ROOT / "benchmarks" / "peers")))
    return (sys.executable, str(script), "{}")


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    byte_tokenizer(tmp_path)
    return Texts(tmp_path, 32)


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_worker_answers_and_says_what_fails(tmp_path: Path) -> None:
    worker = Worker(worker_command(tmp_path), tmp_path / "log", {})
    try:
        assert worker.facts == {"kind": "test"}
        assert worker.ask("prefill", prompt=[1]) == 0.25
        with pytest.raises(Failed, match=r"^ValueError: no room$"):
            worker.ask("fail")
        assert worker.ask("prefill", prompt=[1]) == 0.25
        assert worker.peak() > 1 << 20
        with pytest.raises(Failed, match="exit status 3"):
            worker.ask("exit")
    finally:
        worker.end()


def test_a_worker_at_rest_does_not_spin(tmp_path: Path) -> None:
    worker = Worker(worker_command(tmp_path), tmp_path / "log", {})
    try:
        worker.ask("spin")
        worker.rest()
        time.sleep(0.05)
        before = cpu_seconds(worker.popen.pid)
        time.sleep(0.3)
        assert cpu_seconds(worker.popen.pid) - before <= 0.02
        worker.wake()
        assert worker.ask("prefill", prompt=[1]) == 0.25
        assert "to the log" in worker.log.read_text()
    finally:
        worker.end()


def test_children_end_with_their_group(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = Process((sys.executable, "-c", code), tmp_path / "log", {})
    until = time.monotonic() + 20
    while len(members := group(process.popen.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(members) == 2
    process.rest()
    process.end()
    while group(process.popen.pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert group(process.popen.pid) == []
    assert process.popen.returncode == -signal.SIGKILL


def test_settings_of_the_caller_are_not_the_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    code = "import os; print(sorted(n for n in os.environ if n.startswith(('OMP', 'PYTHON', 'OURS'))))"
    process = Process((sys.executable, "-c", code), tmp_path / "log", {"OURS": "1"})
    process.popen.wait(timeout=30)
    process.end()
    assert (tmp_path / "log").read_text().strip() == "['OURS']"


def test_a_library_counts_with_its_best_setting(tmp_path: Path, texts: Texts) -> None:
    settings = ({"pause": 0.02}, {"pause": 0.01}, {"pause": 0.04})
    subject = Library("a", "p", "f", worker_command(tmp_path), settings)
    measured = InProcess(subject, Amount(8, texts), tmp_path)
    try:
        for turn in range(3):
            measured.measure(turn)
        measured.finish()
    finally:
        measured.process.end()
    assert measured.found.rounds["decode"] == pytest.approx([100, 100, 100])
    assert measured.found.setting == "pause=0.01"
    assert measured.found.rounds["prefill"] == pytest.approx([4 * 32] * 3)
    assert EXPECTED in measured.found.text


def test_a_server_runs_with_its_best_setting(tmp_path: Path, texts: Texts) -> None:
    commands = tuple((sys.executable, SSE, PORT, pause) for pause in ("0.02", "0.002"))
    subject = Server("a", "p", "f", commands, {"ignore_eos": True}, streams=3)
    measured = OverHttp(subject, Amount(8, texts), tmp_path)
    try:
        measured.measure(0)
        found = measured.found
        assert found.setting == "0.002" and EXPECTED in found.text
        assert found.once["start_s"] > 0
        assert set(found.rounds) == {"decode", "gap_ms", "gap_p99_ms", "first_token_ms", "streams"}
        assert 20 < found.rounds["decode"][0] < 500
        assert found.rounds["streams"][0] > found.rounds["decode"][0] * 0.5
        assert len(found.gaps) == 7
    finally:
        measured.process.end()


def test_who_fails_is_named_and_the_others_go_on(tmp_path: Path, texts: Texts) -> None:
    said: list[str] = []
    rounds = Rounds(Amount(8, texts), tmp_path / "logs", said.append)
    good = Server("good", "p", "f", ((sys.executable, SSE, PORT, "0.001"),), {}, streams=1)
    short = Server("short", "p", "f", ((sys.executable, SSE, PORT, "0", "5"),), {})
    gone = Server("gone", "p", "f", ((sys.executable, "-c", "exit('no such file')"),), {})
    try:
        rounds.begin([gone, short, good])
        rounds.measure(3, until=time.monotonic() + 600)
        found = rounds.finish()
        assert [subject.name for subject in found] == ["good"]
        assert [len(values) for values in found[good].rounds.values()] == [3, 3, 3, 3]
        assert len(rounds.bandwidth) == len(rounds.load) == 3 and min(rounds.bandwidth) > 1e8
        assert found[good].once["peak_mib"] > 1
    finally:
        rounds.end()
    assert any(line.startswith("gone, server: left out: exit status 1: no such file; see ") for line in said)
    assert "short, server: left out: 5 tokens came where 32 were asked for" in said


def test_no_round_begins_that_would_end_too_late(tmp_path: Path, texts: Texts) -> None:
    said: list[str] = []
    rounds = Rounds(Amount(8, texts), tmp_path / "logs", said.append)
    try:
        rounds.measure(5, until=0)
    finally:
        rounds.end()
    assert len(rounds.bandwidth) == 1 and said[-1] == "no time for more than 1 rounds"


def test_texts_have_the_tokens_they_say(texts: Texts) -> None:
    assert len(texts.long(0).ids) == len(texts.long(1).ids) == 32
    assert len({texts.long(turn).text for turn in (BEFORE, *range(20))}) == 21, "no cache has seen one"
    streams = texts.streams(8)
    assert len({each.text[:4] for each in streams}) == 8


def test_what_commands_do_not_share() -> None:
    one, two = ("a", "-x", "1", "--y", "2", "z"), ("a", "-x", "3", "--y", "2", "z", "--more")
    assert differing(one, (one, two)) == "-x 1"
    assert differing(two, (one, two)) == "-x 3 --more"
    assert differing(one, (one,)) == ""
