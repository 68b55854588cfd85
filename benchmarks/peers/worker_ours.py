"""Our engine as a worker: greedy decoding in process, the time to the first token, and the read bandwidth."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from threading import Event
from typing import Any

from worker_lines import Verb, answer, gaps

from nybble.cli import SPINS
from nybble.config import ServeConfig
from nybble.engine.request import Delta, Request, SamplingParams

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as the command line does, before torch is imported

from nybble.engine.build import build_engine


class Subject:
    def __init__(self, config: ServeConfig) -> None:
        self.engine = build_engine(config, lambda phase, part: None)
        self.ids = itertools.count()

    def run(self, prompt: list[int], tokens: int) -> tuple[float, list[float], list[int]]:
        """(seconds to the first token, arrivals, ids), greedy, whatever ends a text."""
        arrivals: list[float] = []
        ids: list[int] = []
        done = Event()

        def sink(delta: Delta) -> None:
            if delta.token is not None:
                arrivals.append(time.perf_counter())
                ids.append(delta.token)
            if delta.finish:
                done.set()

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        sent = time.perf_counter()
        self.engine.submit(Request(str(next(self.ids)), tuple(prompt), params), sink)
        done.wait()
        return arrivals[0] - sent, arrivals, ids

    def decode(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        _, arrivals, ids = self.run(prompt, tokens)
        return {"gaps": gaps(arrivals), "ids": ids}

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token is chosen."""
        return self.run(prompt, 1)[0]

    def step_bytes(self) -> float:
        """Bytes that a decode step had to read, on average over all so far."""
        stats = self.engine.stats()
        return stats.decode_bytes / max(stats.decode_steps, 1)


def make(**settings: Any) -> tuple[Mapping[str, Any], Mapping[str, Verb]]:
    subject = Subject(ServeConfig(**settings))
    info = subject.engine.info
    facts: dict[str, Any] = {
        "kernels": dict(info.kernels),
        "quantization": info.quantization,
        "directory": info.directory,
        "read_bandwidth": info.bandwidth,
    }
    verbs: dict[str, Verb] = {"decode": subject.decode, "prefill": subject.prefill}
    return facts, verbs | {"step_bytes": subject.step_bytes}


if __name__ == "__main__":
    answer(make)
