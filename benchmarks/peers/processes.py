"""Subjects as process groups: started alone, stopped while others are measured, ended together.

A stopped process cannot spin: llama.cpp's pool of OpenMP threads waits actively, and on two cores that is
half of what the others have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from environments import telling
from wire import Failed

PRIVATE = ("PYTHON", "NYBBLE_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "LLAMA_", "VLLM_")
"""Settings of the caller that are not the subject's own."""

Json = Any


class Process:
    """One program in a session of its own; what it says goes to a log."""

    def __init__(self, command: Sequence[str], log: Path, extra: Mapping[str, str], **pipes: Any) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)}
        self.log = log
        with log.open("ab") as sink:
            given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": sink} | pipes
            self.popen: subprocess.Popen[Any] = subprocess.Popen(
                command, env={**kept, **extra}, start_new_session=True, stderr=sink, **given
            )

    def rest(self) -> None:
        """Stop it, threads and children, until `wake`."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """The group is gone afterwards, whatever state it was in."""
        self._signal(signal.SIGKILL)
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _signal(self, which: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, which)

    def failure(self) -> str:
        """How it ended, with the last telling line, and where the others are."""
        said = telling(self.log.read_text(encoding="utf8", errors="replace"))
        return f"exit status {self.popen.wait()}: {said or 'it said nothing'}; see {self.log}"

    def peak(self) -> int:
        """Bytes: the greatest resident memory of each process of the group, summed; mapped files count."""
        return sum(high_water(process) for process in group(self.popen.pid))


def group(leader: int) -> list[int]:
    """The processes of a group, by /proc; none on a system without."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == leader:
                found.append(int(stat.parent.name))
    return found


def high_water(process: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Worker(Process):
    """A program that answers a line of JSON with a line of JSON."""

    def __init__(self, command: Sequence[str], log: Path, extra: Mapping[str, str]) -> None:
        super().__init__(
            command, log, extra, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            self.facts: dict[str, Json] = self._answer()
        except BaseException:
            self.end()
            raise

    def ask(self, verb: str, **arguments: Json) -> Json:
        """Raises `Failed` with what the program says went wrong."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps({"do": verb, **arguments}) + "\n")
        except BrokenPipeError:
            raise Failed(self.failure()) from None
        return self._answer()

    def _answer(self) -> Json:
        assert self.popen.stdout is not None
        if not (line := self.popen.stdout.readline()):
            raise Failed(self.failure())
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["done"]
