"""A rate over the recent past, from counters that are read at irregular times by any number of scrapers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

SPAN = 15.0
"""Seconds; the usual scrape interval."""


class Window:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float, float]] = deque([(clock(), 0.0, 0.0)])
        self._last = 0.0

    def rate(self, amount: float, seconds: float) -> float:
        """Growth of `amount` per growth of `seconds` since about `SPAN` ago; without any, the last rate."""
        now = self._clock()
        while len(self._seen) > 1 and self._seen[1][0] <= now - SPAN:
            self._seen.popleft()
        _, old_amount, old_seconds = self._seen[0]
        if seconds > old_seconds:
            self._last = (amount - old_amount) / (seconds - old_seconds)
        if now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, amount, seconds))
        return self._last
