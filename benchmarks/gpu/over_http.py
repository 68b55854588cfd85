"""Part 5: what HTTP costs at batch 1: one engine, asked in process and over its server, in turn.

    python benchmarks/gpu/over_http.py

The server runs in this process, as it does under `nybble serve`; the client that counts its events is a
process of its own. Prompt, counting and rates are those of benchmarks/decode.py.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from part import Part, begin, missing, parser
from rows import spread

NEEDS = (
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "orjson",
    "cyclopts",
    "prometheus_client",
    "tokenizers",
)
MODEL, KIND = "Llama-2-7B", "W4A16"
TOKENS = 256
ROUNDS = 9
NAME = "bench"  # of the model, as the client of benchmarks/decode.py asks for it


class InProcess:
    """The requests of benchmarks/decode.py to an engine that is there already."""

    def __init__(self, engine: Any) -> None:
        from decode import PROMPT, InProcess

        from nybble.text.tokenizer import Tokenizer

        self.rate = InProcess.rate.__get__(self)
        self.engine, self.count = engine, 0
        self.prompt = tuple(Tokenizer.load(Path(engine.info.directory)).encode(PROMPT).ids)


@contextlib.contextmanager
def server(config: Any, engine: Any) -> Iterator[str]:
    """Address of a server of that engine, once it is ready."""
    from nybble.api.serve import Server, listen

    ready = threading.Event()
    made = Server(config, lambda settings, progress: engine, lambda loaded: ready.set())
    with listen(config) as sock:
        thread = threading.Thread(target=made.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        if not ready.wait(60):
            raise TimeoutError(f"the server is not ready: {made.failure}")
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        made.should_exit = True
        thread.join(20)


class Client:
    """A process that sends one request for every line it gets, and answers with tokens per second."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, __file__, "--client", url]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def rate(self, tokens: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def client(url: str) -> None:
    """What that process does."""
    from decode import OverHttp

    asked = OverHttp(url)
    for line in sys.stdin:
        print(asked.rate(int(line)), flush=True)


def measure(part: Part, engine: Any, config: Any) -> None:
    tokens = 8 if part.dry else TOKENS
    inside = InProcess(engine)
    found: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    with server(config, engine) as url, contextlib.closing(Client(url)) as outside:
        for turn in range(2 if part.dry else ROUNDS + 1):
            for name, subject in (("in process", inside), ("over HTTP", outside)):
                value = subject.rate(tokens)
                if turn:  # the first round warms up
                    found[name].append(value)
            if turn and part.left() < 0:
                break
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    part.rows.write(
        model="tiny" if part.dry else MODEL,
        kind=KIND,
        tokens=tokens,
        in_process=spread(found["in process"], 1),
        over_http=spread(found["over HTTP"], 1),
        of_in_process=spread(ratios, 4),
    )
    part.tell(f"{MODEL} {KIND}: {spread(found['over HTTP'])['median']:.0f} tokens/s over HTTP")


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--client", help=argparse.SUPPRESS)
    return found.parse_args()


def main() -> int:
    asked = arguments()
    if asked.client:
        client(asked.client)
        return 0
    part = begin("over_http", asked)
    if absent := missing(*NEEDS):
        part.lacks("over_http", f"{', '.join(absent)} not installed")
        return 3
    from random_engine import random_engine

    with tempfile.TemporaryDirectory() as folder:
        try:
            engine, config = random_engine(part, Path(folder), MODEL, KIND, NAME)
        except ImportError as error:
            part.lacks("over_http", str(error))
            return 3
        began = time.perf_counter()
        measure(part, engine, config)
        part.say(f"took {time.perf_counter() - began:.0f} s")
        engine.stop()
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
