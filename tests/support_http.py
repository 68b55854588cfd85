"""The real HTTP server on a free loopback port, in a thread, around any engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from nybble.api.lifecycle import Build
from nybble.api.serve import Server, listen
from nybble.config import ServeConfig
from nybble.engine.protocol import EngineProtocol


@dataclass
class Served:
    port: int
    server: Server
    client: httpx2.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **options)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream that ends well."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        parts = answer.text.split("\n\n")
        assert parts.pop() == ""
        assert parts.pop() == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts if not part.startswith(":")]

    def metric(self, sample: str) -> float:
        """The value of one sample of /metrics, given as it is written there."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample)

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            yield sock


@contextmanager
def serving(engine: EngineProtocol | Build, *, wait: bool = True, **settings: Any) -> Iterator[Served]:
    """`engine` may be a way to build one. Leaves as SIGTERM would."""
    config = ServeConfig(port=0, **{"drain_timeout": 1.0, **settings})
    build: Build = engine if callable(engine) else lambda config, progress: engine
    server = Server(config, build)
    sock = listen(config)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
        try:
            eventually(lambda: server.started)
            if wait:
                eventually(lambda: client.get("/readyz").status_code == 200)
            yield Served(port, server, client)
        finally:
            server.should_exit = True
            server.lifecycle.stop()
            thread.join(timeout=20)
            sock.close()
    assert not thread.is_alive()


def eventually(check: Callable[[], bool], within: float = 5.0) -> None:
    end = time.monotonic() + within
    while not check():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def request_bytes(path: str, body: Any, *headers: str) -> bytes:
    """A POST as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content
