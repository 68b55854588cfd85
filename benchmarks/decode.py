"""Batch-1 decoding, side by side: in process, over HTTP, the PyTorch path, and the memory's read bandwidth.

    python benchmarks/decode.py                      the default model, 15 interleaved rounds
    python benchmarks/decode.py --save               append the row to benchmarks/results/decode.jsonl

Each round measures every subject once, in turn, on the same prompt, and the machine's read bandwidth beside
them. Medians and ranges are printed; ratios are medians of the rounds' own ratios, so that drift cancels.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

from nybble.bench.machine import facts
from nybble.cli import SPINS
from nybble.config import ServeConfig
from nybble.engine.request import Delta, Request, SamplingParams
from nybble.text.tokenizer import Tokenizer

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as the command line does, before torch is imported

from nybble.engine.bandwidth import read_bandwidth
from nybble.engine.build import build_engine
from nybble.engine.engine import Engine

PROMPT = (
    "The history of the city begins with a small settlement on the river, where traders met in the spring. "
    * 4
)
RESULTS = Path(__file__).parent / "results" / "decode.jsonl"


class InProcess:
    """An engine in this process: tokens per second between the first and the last token."""

    def __init__(self, config: ServeConfig) -> None:
        self.engine: Engine = build_engine(config, lambda phase, part: None)
        self.prompt = tuple(Tokenizer.load(Path(self.engine.info.directory)).encode(PROMPT).ids)
        self.count = 0

    def rate(self, tokens: int) -> float:
        arrivals: list[float] = []
        done = Event()

        def sink(delta: Delta) -> None:
            arrivals.append(time.perf_counter())
            if delta.finish:
                done.set()

        self.count += 1
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(Request(str(self.count), self.prompt, params), sink)
        done.wait()
        return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


class OverHttp:
    """A server in a process of its own, and a streaming client that only reads and counts: on two cores
    a client that parses takes its time from the server."""

    def __init__(self, url: str) -> None:
        self.host, self.port = url.removeprefix("http://").split(":")

    def rate(self, tokens: int) -> float:
        asked = {"model": "bench", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        body = json.dumps(asked | {"stream": True, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        arrivals: list[float] = []
        with socket.create_connection((self.host, int(self.port)), timeout=60) as line:
            line.sendall(head.encode() + body)
            while received := line.recv(1 << 16):
                arrivals += [time.perf_counter()] * received.count(b'data: {"id"')
        assert len(arrivals) >= tokens, f"{len(arrivals)} events for {tokens} tokens"
        return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


@contextmanager
def server(flags: Sequence[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "nybble",
        "serve",
        "--port",
        str(port),
        "--served-model-name",
        "bench",
        *flags,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _ready(url):
                if process.poll() is not None:
                    raise SystemExit(f"error: the server ended with {process.returncode}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def measure(subjects: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One value per subject and round, in turn; the first round warms up and is not counted."""
    values: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds + 1):
        for name, run in subjects.items():
            value = run()
            if turn:
                values[name].append(value)
        print(f"round {turn}/{rounds}", file=sys.stderr)
    return values


def summary(values: dict[str, list[float]], bytes_per_token: float) -> dict[str, Any]:
    rates = {k: v for k, v in values.items() if k != "read GB/s"}
    reference = values["in process"]
    return {
        name: {
            "median": round(statistics.median(samples), 1),
            "min": round(min(samples), 1),
            "max": round(max(samples), 1),
            "of_in_process": round(
                statistics.median(a / b for a, b in zip(samples, reference, strict=True)), 3
            ),
            "of_read_bandwidth": round(
                statistics.median(
                    rate * bytes_per_token / (gb * 1e9)
                    for rate, gb in zip(samples, values["read GB/s"], strict=True)
                ),
                3,
            ),
        }
        for name, samples in rates.items()
    } | {"read GB/s": {"median": round(statistics.median(values["read GB/s"]), 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch path out")
    parser.add_argument("--save", action="store_true", help=f"append the row to {RESULTS.name}")
    asked = parser.parse_args()
    settings: dict[str, Any] = {"model": asked.model, "threads": asked.threads, "kv_cache_tokens": 8192}
    threads = asked.threads or os.cpu_count() or 1
    inside = InProcess(ServeConfig(**settings))
    subjects: dict[str, Callable[[], float]] = {"in process": lambda: inside.rate(asked.tokens)}
    flags = [asked.model, "--threads", str(asked.threads), "--kv-cache-tokens", "8192"]
    with server(flags) as url:
        outside = OverHttp(url)
        subjects["over HTTP"] = lambda: outside.rate(asked.tokens)
        if not asked.no_torch:
            portable = InProcess(ServeConfig(**(settings | {"kernels": "torch"})))
            subjects["torch ops in process"] = lambda: portable.rate(asked.tokens)
        subjects["read GB/s"] = lambda: read_bandwidth(threads) / 1e9
        values = measure(subjects, asked.rounds)
    stats = inside.engine.stats()
    row = {
        "benchmark": "decode",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": inside.engine.info.model,
        "quantization": inside.engine.info.quantization,
        "kernels": dict(inside.engine.info.kernels),
        "threads": threads,
        "tokens": asked.tokens,
        "rounds": asked.rounds,
        "bytes_per_token": round(stats.decode_bytes / stats.decode_steps),
        "tokens_per_second": summary(values, stats.decode_bytes / stats.decode_steps),
        **facts(),
    }
    print(json.dumps(row, indent=2))
    if asked.save:
        with RESULTS.open("a", encoding="utf8") as sink:
            sink.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
