"""The real HTTP server in a process of its own, on an engine that only pretends: no torch, no model."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("server", "kernels", "models", "quantizers", "tests")
ANSWER = "The quick brown fox jumps over the lazy dog. " * 4


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without settings of nybble, with the source folders importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NYBBLE_", "OPENAI_"))}
    paths = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "120"} | extra


@contextmanager
def fake_server(folder: Path, *, pause: float = 0.002, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the address of a ready server whose model is called "tiny"."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(pause), *keys],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    try:
        yield _first_line(process)
    finally:
        process.terminate()
        process.wait(timeout=20)
        if process.stdout is not None:
            process.stdout.close()


def _first_line(process: subprocess.Popen[str], timeout: float = 60.0) -> str:
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda out=process.stdout: lines.put(out.readline()), daemon=True).start()
    line = lines.get(timeout=timeout).strip()
    assert line, f"the server ended with {process.wait()}"
    return line


def _serve(folder: Path, pause: float, keys: tuple[str, ...]) -> None:
    from nybble.api.serve import run
    from nybble.config import ServeConfig
    from support_engine import FakeEngine, byte_tokenizer, says

    engine = FakeEngine(byte_tokenizer(folder), says(ANSWER, pause=pause))
    ports: list[int] = []
    run(
        ServeConfig(port=0, api_key=keys),
        build=lambda config, progress: engine,
        on_listen=ports.append,
        on_ready=lambda loaded: print(f"http://127.0.0.1:{ports[0]}", flush=True),
    )


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), float(sys.argv[2]), tuple(sys.argv[3:]))
