"""Stop strings over a stream: nothing is let out that may still turn into the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Each stop string has its Knuth-Morris-Pratt state, so a character costs the same however long it is.

    The first string to be completed wins; of two that end together, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple((stop, _failure(stop)) for stop in stops)
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.stop: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now. After a stop string was completed (`self.stop`), call no more."""
        if not self._stops:
            return text
        end = self._scan(text)
        seen = self._held + text
        if self.stop is not None:
            shown = seen[: len(self._held) + end - len(self.stop)]
            self._held = ""
            return shown
        keep = len(seen) - max(self._matched)
        self._held = seen[keep:]
        return seen[:keep]

    def flush(self) -> str:
        """The text ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _scan(self, text: str) -> int:
        """Advance all states; returns the position just behind the completed stop string, or 0."""
        if not any(self._matched) and not any(stop[0] in text for stop, _ in self._stops):
            return 0
        for position, char in enumerate(text, 1):
            for i, (stop, failure) in enumerate(self._stops):
                state = self._matched[i]
                while state and stop[state] != char:
                    state = failure[state - 1]
                state += stop[state] == char
                self._matched[i] = state
                if state == len(stop):
                    self.stop = max(stop, self.stop or "", key=len)
                    self._matched[i] = failure[state - 1]
            if self.stop is not None:
                return position
        return 0


def _failure(pattern: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(pattern)
    state = 0
    for i in range(1, len(pattern)):
        while state and pattern[state] != pattern[i]:
            state = table[state - 1]
        state += pattern[state] == pattern[i]
        table[i] = state
    return tuple(table)
