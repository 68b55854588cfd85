"""How the peers of benchmarks/peers are installed: plans, and what happens when a step does not work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_cpp_peer
import openvino_peer
import pytest
import transformers_peer
import vllm_peer
from environments import Environment, Step, build, run, telling
from subjects import PORT, Files, Library, Server
from wire import Failed

from support_process import ROOT

PEERS = (llama_cpp_peer, openvino_peer, transformers_peer, vllm_peer)
FILES = Files(Path("m.Q4_1.gguf"), Path("m.Q4_0.gguf"), Path("floats"), Path("awq"), "default")


def python(code: str, optional: bool = False) -> Step:
    return Step((sys.executable, "-c", code), optional)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: str(peer.NAME))
def test_a_plan_stays_in_its_own_environment(peer: object, tmp_path: Path) -> None:
    made = peer.environment(tmp_path / "home")  # type: ignore[attr-defined]
    first, *steps = made.plan
    assert first.command[1:] == ("-m", "venv", str(tmp_path / "home"))
    for step in steps:
        assert step.command[0] in (str(tmp_path / "home" / "bin" / "python"), "cmake")
    installs = [step.command for step in steps if "install" in step.command]
    assert installs, "every peer is installed by pip"
    words = [word for command in installs for word in command]
    assert all(word == "torch==2.13.0" for word in words if word.startswith("torch"))
    assert str(tmp_path) not in made.recipe, "moving the folder does not install anew"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment is a folder: making a real one takes seconds."""

    def plan(environment: Environment) -> tuple[Step, ...]:
        return (python(f"import os; os.makedirs({str(environment.home)!r})"), *environment.steps)

    monkeypatch.setattr(Environment, "plan", property(plan))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: str(peer.NAME))
def test_subjects_of_a_peer(peer: object, tmp_path: Path) -> None:
    if peer is llama_cpp_peer:
        (tmp_path / llama_cpp_peer.SERVER).parent.mkdir(parents=True)
        (tmp_path / llama_cpp_peer.SERVER).touch()
    found = list(peer.subjects(tmp_path, FILES))  # type: ignore[attr-defined]
    assert found and all(each.peer == peer.NAME for each in found)  # type: ignore[attr-defined]
    for each in found:
        commands = [each.command] if isinstance(each, Library) else each.commands
        assert all(command[0].startswith(str(tmp_path)) for command in commands)
        assert isinstance(each, Library) or all(PORT in command for command in each.commands)
    random = list(peer.subjects(tmp_path, Files(FILES.source, served=False)))  # type: ignore[attr-defined]
    assert not any(isinstance(each, Server) for each in random)


def test_llama_cpp_without_its_server(tmp_path: Path) -> None:
    names = [each.name for each in llama_cpp_peer.subjects(tmp_path, FILES)]
    assert names == ["llama.cpp Q4_1", "llama.cpp Q4_0", "llama-cpp-python server Q4_1"]


@pytest.mark.usefixtures("bare")
def test_an_environment_is_built_once(tmp_path: Path) -> None:
    said: list[str] = []
    note = python(f"open({str(tmp_path / 'runs')!r}, 'a').write('x')")
    environment = Environment("a", tmp_path / "a", (note,))
    assert not environment.installed
    build(environment, said.append)
    build(environment, said.append)
    assert (tmp_path / "runs").read_text() == "x"
    assert environment.installed and len(said) == 1
    assert not Environment("a", tmp_path / "a", (note, note)).installed, "its recipe has changed"


@pytest.mark.usefixtures("bare")
def test_a_step_that_fails_is_a_line(tmp_path: Path) -> None:
    environment = Environment("a", tmp_path / "a", (python("print('ERROR: no room'); print('x'); exit(3)"),))
    with pytest.raises(Failed, match=r"^ERROR: no room$"):
        build(environment, lambda line: None)
    assert not environment.installed


@pytest.mark.usefixtures("bare")
def test_an_optional_step_may_fail(tmp_path: Path) -> None:
    said: list[str] = []
    build(Environment("a", tmp_path / "a", (Step(("no-such-program", "it"), optional=True),)), said.append)
    assert said[-1] == "a: without it: there is no no-such-program"


def test_a_step_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="not done in time"):
        run((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path / "log", until=0)


def test_the_telling_line() -> None:
    assert telling("a\nerror: b  c\nd\n\n") == "error: b c"
    assert telling("a\nd\n") == "d"
    assert telling("") == ""


def test_requirements_without_some(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "peers" / "requirements_of.py"
    command = [sys.executable, str(script), "transformers", str(tmp_path / "wanted"), "numpy"]
    subprocess.run(command, check=True, timeout=60)
    lines = (tmp_path / "wanted").read_text().splitlines()
    assert any(line.startswith("tokenizers") for line in lines)
    assert not any(line.startswith("numpy") or "extra ==" in line for line in lines)
