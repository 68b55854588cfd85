"""Compiles ahead, in parallel, into the caches on disk: a part then spends its time on measuring."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeVar

from part import Part

T = TypeVar("T")

WORKERS = 12


def warm(part: Part, script: Path, jobs: int, flags: list[str], seconds: float) -> None:
    """Runs `script --warm i/n` in n processes and waits, at most so long; the rest is compiled later."""
    workers = min(WORKERS, jobs, max(1, (os.cpu_count() or 2) - 2))
    command = [sys.executable, str(script), "--out", str(part.arguments.out), *flags]
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [*command, "--warm", f"{i}/{workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(workers)
    ]
    for process in running:
        try:
            process.wait(timeout=max(0.1, started + seconds - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    part.say(f"compiled ahead in {workers} processes: {time.perf_counter() - started:.0f} s")


def share(jobs: list[T], which: str) -> list[T]:
    """The jobs of worker "i/n"."""
    index, count = map(int, which.split("/"))
    return jobs[index::count]
