"""Where the time of a captured chain goes: its kernels by name and grid."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from clock import Chain

REPLAYS = 5
MOST = 20  # kernels that are kept, the longest first


def kernel_times(chain: Chain) -> dict[str, dict[str, float]]:
    """Microseconds and launches of one replay, by kernel. The grid tells matrices apart."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            chain.replay()
        torch.cuda.synchronize()
    return summed(traced(profiler))


def traced(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    """From the trace: the profiler's own tables have no grids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8"))["traceEvents"]
    return found


def summed(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    us: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "kernel":
            name = f"{event['name']} {event['args'].get('grid', '')}"
            us[name] += event["dur"]
            calls[name] += 1
    return {
        name: {"us": round(time / REPLAYS, 2), "calls": calls[name] / REPLAYS}
        for name, time in us.most_common(MOST)
    }
