"""`transformers serve` over the same model's weights as floats: a server that does not quantize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from environments import Environment, install
from subjects import PORT, Files, Server, Subject

NAME = "transformers"
REQUIREMENTS = ("torch==2.13.0", "transformers[serving]==5.23.0", "accelerate==1.15.0")


def environment(home: Path) -> Environment:
    return Environment(NAME, home, (install(home, *REQUIREMENTS),))


def subjects(home: Path, files: Files) -> Iterator[Subject]:
    if files.floats is not None and files.served:
        flags = f"--host 127.0.0.1 --port {PORT} --device cpu".split()
        command = (str(home / "bin" / "transformers"), "serve", str(files.floats), *flags)
        yield Server(
            "transformers serve",
            NAME,
            str(files.floats),
            tuple((*command, "--dtype", dtype) for dtype in ("bfloat16", "float32")),
            {"model": str(files.floats)},
            "/health",
            streams=1,  # its continuous batching is made for GPUs: on two cores a short answer takes minutes
            environment={"HF_HUB_OFFLINE": "1"},
        )
