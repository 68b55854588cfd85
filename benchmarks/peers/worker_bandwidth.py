"""The memory's read bandwidth, measured when asked: the process holds nothing in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker_lines import Verb, answer

from nybble.engine.bandwidth import read_bandwidth


def make(threads: int) -> tuple[Mapping[str, Any], Mapping[str, Verb]]:
    return {}, {"read": lambda: read_bandwidth(threads)}


if __name__ == "__main__":
    answer(make)
