"""`nybble serve` as a user starts it: a process of its own on a free port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        """The sum over the samples whose name and labels start so."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(model: str, log: Path, *flags: str, ready_within: float = 60.0) -> Iterator[Server]:
    """Start, wait until ready, and stop by SIGTERM. The log is shown when the server does not come up."""
    port = free_port()
    command = [sys.executable, "-m", "nybble", "serve", model, "--port", str(port), *flags]
    root = Path(__file__).resolve().parents[1]
    floors = os.pathsep.join(str(root / floor) for floor in ("server", "quantizers", "models", "kernels"))
    environment = os.environ | {"PYTHONPATH": floors, "PYTHONSAFEPATH": "1"}
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            _wait_until_ready(server, ready_within)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(
                f"the server ended with {server.process.returncode}:\n{server.log.read_text()[-4000:]}"
            )
        try:
            if json.loads(server.get("/readyz"))["status"] == "ready":
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"not ready within {seconds} s:\n{server.log.read_text()[-4000:]}")
