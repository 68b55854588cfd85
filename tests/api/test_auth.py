"""Every route is closed without a key, but for the probes: a new route fails here until it is listed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support_engine import FakeEngine
from support_http import Served, serving

KEYS = ("first-key", "second-key")
OPEN = {("GET", path) for path in ("/livez", "/readyz", "/health", "/ping")}
CLOSED = {
    *(
        ("GET", path)
        for path in ("/", "/version", "/metrics", "/openapi.json", "/tokenizer_info", "/v1/models")
    ),
    ("GET", "/v1/models/{name}"),
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")),
}
SPELLINGS = (
    "//v1/models",
    "/v1/models/",
    "/V1/models",
    "/v1/../livez",
    "/livez/../v1/models",
    "/livez/",
    "/%6civez/x",
)


@pytest.fixture(scope="module")
def locked(shared_engine: FakeEngine) -> Iterator[Served]:
    with serving(shared_engine, api_key=KEYS, metrics_open=False) as server:
        yield server


def ask(served: Served, method: str, path: str, **headers: str) -> int:
    body: Any = {"content": b"{}"} if method == "POST" else {}
    return int(
        served.client.request(method, path.replace("{name}", "tiny"), headers=headers, **body).status_code
    )


def test_all_routes_are_listed(locked: Served) -> None:
    paths = locked.client.get("/openapi.json", headers={"Authorization": f"Bearer {KEYS[0]}"}).json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found | {("GET", "/openapi.json")} == OPEN | CLOSED


@pytest.mark.parametrize(("method", "path"), sorted(OPEN))
def test_probes_need_no_key(locked: Served, method: str, path: str) -> None:
    assert ask(locked, method, path) == 200


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer first-ke",
        "Bearer first-key2",
        "first-key",
        "Basic first-key",
    ],
)
@pytest.mark.parametrize(("method", "path"), sorted(CLOSED))
def test_everything_else_is_closed(locked: Served, method: str, path: str, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    assert ask(locked, method, path, **headers) == 401


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("method", "path"), sorted(CLOSED))
def test_each_key_opens(locked: Served, method: str, path: str, key: str) -> None:
    assert ask(locked, method, path, Authorization=f"Bearer {key}") in (200, 400)


@pytest.mark.parametrize("path", SPELLINGS)
def test_other_spellings_are_closed(locked: Served, path: str) -> None:
    with locked.connection() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: livez\r\nConnection: close\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_refusal_has_the_usual_shape(locked: Served) -> None:
    answer = locked.client.get("/v1/models")
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


def test_keys_are_secret_before_the_model_is_ready(engine: FakeEngine) -> None:
    loaded = threading.Event()

    def build(config: Any, progress: Any) -> FakeEngine:
        loaded.wait(timeout=10)
        return engine

    with serving(build, wait=False, api_key=KEYS) as served:
        assert ask(served, "GET", "/v1/models") == 401
        assert ask(served, "GET", "/v1/models", Authorization=f"Bearer {KEYS[0]}") == 503
        loaded.set()


def test_metrics_may_be_open_and_keys_may_be_in_a_file(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n\n")
    with serving(engine, api_key_file=str(file)) as served:
        assert ask(served, "GET", "/metrics") == 200
        assert ask(served, "GET", "/v1/models") == 401
        assert ask(served, "GET", "/v1/models", Authorization="bearer from-file") == 200
