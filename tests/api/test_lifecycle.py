"""From the first listening second to the last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nybble.api.serve import listen, run
from nybble.config import ServeConfig
from nybble.engine.protocol import Progress
from nybble.errors import CheckpointError, UsageError
from support_engine import FakeEngine, says
from support_http import Served, eventually, request_bytes, serving

MODEL_ROUTES = ("/v1/models", "/v1/models/tiny", "/tokenizer_info")
PROBES = ("/readyz", "/health", "/ping")


class SlowBuild:
    """Builds step by step, when the test says so."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.steps = {name: threading.Event() for name in ("warm", "done")}

    def __call__(self, config: ServeConfig, progress: Progress) -> FakeEngine:
        progress("weights", 0.25)
        assert self.steps["warm"].wait(10)
        progress("warm-up", 0.5)
        assert self.steps["done"].wait(10)
        return self.engine


def test_listens_before_the_model_is_loaded(engine: FakeEngine) -> None:
    build = SlowBuild(engine)
    with serving(build, wait=False) as served:
        eventually(lambda: served.client.get("/readyz").json().get("phase") == "weights")
        for path in PROBES:
            answer = served.client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert answer.json() == {"status": "loading", "phase": "weights", "progress": 0.25}
        for path in MODEL_ROUTES:
            answer = served.client.get(path)
            assert answer.status_code == 503 and "retry-after" in answer.headers
            assert answer.json()["error"]["code"] == "not_ready"
        assert served.client.get("/livez").status_code == 200
        assert served.metric("nybble_ready") == 0
        build.steps["warm"].set()
        eventually(lambda: served.client.get("/readyz").json()["status"] == "warming")
        build.steps["done"].set()
        eventually(lambda: served.client.get("/readyz").status_code == 200)
        assert all(served.client.get(path).status_code == 200 for path in (*MODEL_ROUTES, *PROBES, "/livez"))
        assert served.metric("nybble_ready") == 1
    assert engine.stopped


@pytest.mark.parametrize("fate", [{"heartbeat_age": 1000.0}, {"alive": False}], ids=["stuck", "gone"])
def test_dead_engine_loop_is_noticed(engine: FakeEngine, fate: dict[str, float]) -> None:
    with serving(engine) as served:
        for name, value in fate.items():
            setattr(engine, name, value)
        assert served.client.get("/livez").status_code == 503
        assert served.client.get("/readyz").json()["status"] == "dead"
        assert served.client.get("/v1/models").json()["error"]["code"] == "engine_stopped"


@pytest.mark.parametrize(
    "error", [CheckpointError("w.safetensors: cut off"), ValueError("bug")], ids=["own", "bug"]
)
def test_failing_build_is_raised(error: Exception) -> None:
    def build(config: ServeConfig, progress: Progress) -> FakeEngine:
        raise error

    ports: list[int] = []
    with pytest.raises(type(error)) as caught:
        run(ServeConfig(port=0), build=build, on_listen=ports.append)
    assert caught.value is error
    assert ports[0] > 0


def test_folder_without_a_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        run(ServeConfig(port=0), build=lambda config, progress: FakeEngine(tmp_path))


def test_port_in_use_is_a_usage_error() -> None:
    with listen(ServeConfig(port=0)) as sock:
        sock.listen()
        with pytest.raises(UsageError, match="cannot listen on 127"):
            listen(ServeConfig(port=sock.getsockname()[1]))


def leave(served: Served, times: int = 1) -> None:
    """What the signal handler does."""
    loop = served.server.servers[0].get_loop()
    for _ in range(times):
        loop.call_soon_threadsafe(served.server.leave)


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


BODY = {"prompt": "a", "max_tokens": 100, "stream": True}


def test_drain_lets_running_requests_finish(engine: FakeEngine) -> None:
    engine.script = says("abcdefghij", pause=0.1)
    with serving(engine, drain_timeout=10) as served, served.connection() as sock:
        sock.sendall(request_bytes("/v1/completions", BODY))
        eventually(lambda: engine.stats().running == 1)
        leave(served)
        eventually(lambda: served.client.get("/readyz").json()["status"] == "draining")
        refused = served.post("/v1/completions", BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        assert served.client.get("/livez").status_code == 200
        answer = b""
        while part := sock.recv(65536):
            answer += part
        assert b"data: [DONE]" in answer
    assert engine.aborted == []
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{served.url}/livez", trust_env=False)


@pytest.mark.parametrize(("times", "timeout"), [(1, 0.3), (2, 60.0)], ids=["time-is-up", "second-signal"])
def test_what_does_not_finish_gets_an_error(engine: FakeEngine, times: int, timeout: float) -> None:
    engine.script = says("a" * 100, pause=0.2)
    with serving(engine, drain_timeout=timeout) as served:
        stream, streamed = in_background(lambda: served.client.post("/v1/completions", json=BODY))
        whole, answered = in_background(
            lambda: served.client.post("/v1/completions", json={**BODY, "stream": False})
        )
        eventually(lambda: engine.stats().running == 2 and engine.stats().generation_tokens >= 2)
        began = time.monotonic()
        leave(served, times)
        stream.join(timeout=10)
        whole.join(timeout=10)
        assert time.monotonic() - began < 3
    assert '"code":"shutting_down"' in streamed[0].text and "[DONE]" not in streamed[0].text
    assert (answered[0].status_code, answered[0].json()["error"]["code"]) == (503, "shutting_down")
    assert len(engine.aborted) == 2


PROGRAM = """
import sys
from pathlib import Path
from support_engine import FakeEngine, says
from nybble.api.serve import run
from nybble.config import ServeConfig
engine = FakeEngine(Path(sys.argv[1]), says("a" * 20, pause=0.05))
config = ServeConfig(port=0, drain_timeout=20)
run(config, build=lambda c, p: engine, on_listen=lambda port: print(port, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_drains_and_exits_with_zero(folder: Path, number: signal.Signals) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with httpx2.Client(base_url=url, timeout=10, trust_env=False) as client:
            eventually(lambda: client.get("/readyz").status_code == 200)
            thread, answers = in_background(lambda: client.post("/v1/completions", json=BODY))
            eventually(lambda: "nybble_requests_running 1.0" in client.get("/metrics").text)
            process.send_signal(number)
            thread.join(timeout=10)
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert process.wait(timeout=10) == 0
