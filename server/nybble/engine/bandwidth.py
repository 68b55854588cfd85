"""What the machine gives: read bandwidth of its memory, and how much of it is free."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

PROBE_BYTES = 256 * 1024**2  # larger than any last-level cache it is likely to meet
PASSES = 5


def read_bandwidth(threads: int) -> float:
    """Bytes per second: the median of five sums over 256 MiB with the threads that decode."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        probe = torch.ones(PROBE_BYTES // 4)
        probe.sum()
        return PROBE_BYTES / statistics.median(_seconds(probe) for _ in range(PASSES))
    finally:
        torch.set_num_threads(before)


def _seconds(probe: torch.Tensor) -> float:
    started = time.perf_counter()
    probe.sum()
    return time.perf_counter() - started


def available_memory() -> int:
    """Bytes that can be taken: what the kernel calls available, or the control group's room where smaller."""
    return min(_meminfo(), _cgroup_room())


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 * 1024**3  # not Linux: a laptop's worth
    fields = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
    return fields.get("MemAvailable", fields.get("MemFree", 8 * 1024**3))


def _cgroup_room() -> int:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else int(limit) - used
