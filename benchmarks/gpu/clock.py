"""Times of device work: calls chained in a CUDA graph, subjects in turn, events around many replays.

The calls of one chain read different copies of the weights, more bytes than twice the L2 holds, so that what
is measured comes from memory. On a machine without a GPU the same code runs the calls one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Call = Callable[[], object]
K = TypeVar("K")
SLICE = 2e-3  # seconds that one measurement lasts at least


@dataclass
class Chain:
    """Calls that run back to back. `replay` starts them all; `calls` is their number."""

    replay: Call
    calls: int
    repeats: int = 1  # replays in one measurement
    held: Sequence[Call] = ()  # with the tensors that a graph reads: it keeps none alive itself

    def once(self) -> float:
        """Microseconds a call, over `repeats` replays."""
        return 1e6 * _seconds(self.replay, self.repeats) / (self.repeats * self.calls)


def copies(bytes_each: int, l2_bytes: int | None, least: int = 2, most: int = 64) -> int:
    """How many copies of so many bytes exceed twice the L2."""
    if not l2_bytes:
        return least
    return min(most, max(least, math.ceil(2 * l2_bytes / max(1, bytes_each)) + 1))


def chain(calls: Sequence[Call], device: str) -> Chain:
    """One graph of all calls; each has run once before (compiled, handles made)."""

    def all_of_them() -> None:
        for call in calls:
            call()

    for call in calls[:2]:
        call()
    if device != "cuda":
        return Chain(all_of_them, len(calls))
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
        side.synchronize()
        graph.capture_begin()  # `with torch.cuda.graph` collects garbage first, every time: that takes longer
        try:
            all_of_them()
        finally:
            graph.capture_end()
    found = Chain(graph.replay, len(calls), held=tuple(calls))
    graph.replay()
    found.repeats = max(1, math.ceil(SLICE / max(1e-7, _seconds(graph.replay, 3) / 3)))
    return found


def interleaved(subjects: dict[K, Chain], rounds: int) -> dict[K, list[float]]:
    """Microseconds a call, a value a subject and round; one more round warms up, unless one is all."""
    found: dict[K, list[float]] = {name: [] for name in subjects}
    warming = rounds > 1
    for turn in range(rounds + warming):
        for name, each in subjects.items():
            value = each.once()
            if turn >= warming:
                found[name].append(value)
    return found


def _seconds(replay: Call, times: int) -> float:
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(times):
            replay()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
