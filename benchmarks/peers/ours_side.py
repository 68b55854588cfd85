"""Our side: the GGUF file served as it is, and what `nybble serve` makes of the default model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from subjects import CONTEXT, MODEL, PORT, Files, Library, Server, Subject, worker

NAME = "nybble"


def subjects(files: Files, cache: str) -> Iterator[Subject]:
    as_it_is: dict[str, Any] = {"model": str(files.source), "quantization": "none"}
    yield from _both("as it is", as_it_is, cache)
    if files.default is not None:
        yield from _both("default", {"model": files.default}, cache)


def _both(name: str, settings: dict[str, Any], cache: str) -> Iterator[Subject]:
    settings |= {"kv_cache_tokens": CONTEXT} | ({"cache_dir": cache} if cache else {})
    model = settings["model"]
    flags = [
        word
        for key, value in settings.items()
        if key != "model"
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    where = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # ours may run from its source folders
    yield Library(
        f"{NAME} {name}",
        NAME,
        model,
        worker(sys.executable, "worker_ours.py", **settings),
        environment=where,
        reports_bytes=True,
    )
    yield Server(
        f"{NAME} {name}",
        NAME,
        model,
        (
            (
                sys.executable,
                "-m",
                "nybble",
                "serve",
                model,
                *flags,
                "--port",
                PORT,
                "--served-model-name",
                MODEL,
            ),
        ),
        {"ignore_eos": True, "stream_options": {"include_usage": True}},
        ready="/readyz",
        patience=300.0,  # the first start may quantize and compile
        environment=where,
    )
