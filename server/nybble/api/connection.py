"""uvicorn's h11 protocol with a deadline for headers: a client that dribbles them loses its socket."""

from __future__ import annotations

import asyncio

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from nybble.api.failures import error_body


def protocol_with_deadline(seconds: float) -> type[H11Protocol]:
    """Counts to the end of the headers, from the connection's start and later from a request's first byte.

    Between two requests uvicorn's keep-alive timeout counts instead.
    """

    class Deadline(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._disarm()
            elif self._deadline is None:
                self._arm()

        def send_400_response(self, msg: str) -> None:
            """In the shape of every other error. The connection ends: what follows cannot be understood."""
            content = orjson.dumps(error_body(msg, "invalid_request_error", "bad_http"))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
            ]
            events: tuple[h11.Event, ...] = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=content),
                h11.EndOfMessage(),
            )
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

        def _arm(self) -> None:
            self._deadline = self.loop.call_later(seconds, self.transport.close)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Deadline
