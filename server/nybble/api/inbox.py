"""How deltas get from the engine's thread to the event loop: one wake-up for all that are waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from nybble.engine.request import Delta, Sink
from nybble.errors import NybbleError


class Inbox:
    """For one HTTP request; `index` says which of its sequences a delta belongs to."""

    def __init__(self, idle_after: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Delta]] = deque()
        self._error: NybbleError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waking = False
        self._idle_after = idle_after
        self._awake = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def sink(self, index: int) -> Sink:
        """Called from any thread; never blocks, never raises."""

        def put(delta: Delta) -> None:
            self._items.append((index, delta))
            if not self._waking:
                self._waking = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                    self._loop.call_soon_threadsafe(self._wake)

        return put

    def fail(self, error: NybbleError) -> None:
        """End the stream with this error; deltas that have not been taken are lost."""
        self._error = error
        self._resolve()

    async def take(self) -> list[tuple[int, Delta]]:
        """All that has come; empty when nothing came for a while. Raises what `fail` was given."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._idle_after, self._tick)
        if not self._items and self._error is None:
            self._waiter = self._loop.create_future()
            await self._waiter
        self._awake = self._loop.time()
        if self._error is not None:
            raise self._error
        taken: list[tuple[int, Delta]] = []
        while self._items:
            taken.append(self._items.popleft())
        return taken

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        self._waking = False
        self._resolve()

    def _resolve(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _tick(self) -> None:
        """One timer for the whole stream: a timer per token would cost more than the token."""
        quiet = self._loop.time() - self._awake
        if quiet >= self._idle_after:
            self._resolve()
            quiet = 0.0
        self._timer = self._loop.call_later(self._idle_after - quiet, self._tick)
