"""openvino-genai: its pipeline over the GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from environments import Environment, install
from subjects import Files, Library, Subject, python, worker

NAME = "openvino"


def environment(home: Path) -> Environment:
    return Environment(NAME, home, (install(home, "openvino-genai==2026.4.1"),))


def subjects(home: Path, files: Files) -> Iterator[Subject]:
    for kind, path in (("Q4_1", files.source), ("Q4_0", files.q4_0)):
        if path is not None:
            command = worker(python(home), "worker_openvino.py", path=str(path))
            yield Library(f"openvino-genai {kind}", NAME, str(path), command)
