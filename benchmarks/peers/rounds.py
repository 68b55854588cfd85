"""Interleaved rounds: each subject once a round, alone, with the read bandwidth taken right before it."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from measuring import Amount, Found, Measured, begin
from processes import Worker
from subjects import Subject, threads, worker
from wire import Failed

Say = Callable[[str], None]
MIB = 1 << 20


class Rounds:
    """The subjects that run, and what was found of them. Those that fail are named and left out."""

    def __init__(self, amount: Amount, logs: Path, say: Say) -> None:
        self.amount, self.logs, self.say = amount, logs, say
        self.running: dict[Subject, Measured] = {}
        self.bandwidth: list[float] = []  # bytes a second, of each round
        self.load: list[float] = []  # after each round; far above the cores: others ran too
        logs.mkdir(parents=True, exist_ok=True)
        self.reader = Worker(
            worker(sys.executable, "worker_bandwidth.py", threads=threads()[-1]),
            logs / "bandwidth.log",
            {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )
        self.reader.rest()

    def begin(self, subjects: Sequence[Subject]) -> None:
        for subject in subjects:
            began = time.perf_counter()
            try:
                self.running[subject] = begin(subject, self.amount, self.logs)
            except Failed as failure:
                self.say(f"{subject.name}, {subject.way}: left out: {failure}")
                continue
            seconds = time.perf_counter() - began
            self.say(
                f"{subject.name}, {subject.way}: {seconds:.0f} s; says {self.running[subject].found.text!r}"
            )

    def measure(self, rounds: int, until: float) -> None:
        """So many rounds, or as many as end before `until`, by time.monotonic()."""
        longest = 0.0
        for turn in range(rounds):
            began = time.monotonic()
            if turn and began + longest > until:
                self.say(f"no time for more than {turn} rounds")
                return
            self._round(turn)
            seconds = time.monotonic() - began
            longest = max(longest, seconds)
            self.say(
                f"round {turn + 1}/{rounds}: {seconds:.0f} s, reads {self.bandwidth[-1] / 1e9:.1f} GB/s, "
                f"load {self.load[-1]}"
            )

    def _round(self, turn: int) -> None:
        """Every round begins with another subject."""
        order = list(self.running)
        start = turn % max(len(order), 1)
        readings = []
        for subject in order[start:] + order[:start]:
            readings.append(self._read())
            try:
                with awake(self.running[subject]) as measured:
                    measured.measure(turn)
            except Failed as failure:
                self.say(f"{subject.name}, {subject.way}: left out: {failure}")
                self.running.pop(subject).process.end()
        self.load.append(round(os.getloadavg()[0], 1))
        self.bandwidth.append(statistics.median(readings) if readings else self._read())

    def _read(self) -> float:
        self.reader.wake()
        try:
            return float(self.reader.ask("read"))
        finally:
            self.reader.rest()

    def finish(self) -> dict[Subject, Found]:
        for measured in self.running.values():
            with awake(measured):
                measured.finish()
                measured.found.once["peak_mib"] = measured.process.peak() / MIB
        return {subject: measured.found for subject, measured in self.running.items()}

    def end(self) -> None:
        for measured in self.running.values():
            measured.process.end()
        self.reader.end()


@contextmanager
def awake(measured: Measured) -> Iterator[Measured]:
    measured.process.wake()
    try:
        yield measured
    finally:
        measured.process.rest()
