"""Server-sent events as plain bytes, and the watch for a client that goes away, with a stream or without."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nybble.api.choice import Choice, Piece
from nybble.api.failures import body_of, json_response
from nybble.api.generation import Generation, Usage
from nybble.errors import NybbleError

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED = 499

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is left to answer."""


class Dialect(Protocol):
    """How one endpoint spells what a generation yields."""

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """The event, or events, of a piece."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event behind the last piece; empty if nobody asked for it."""
        ...

    def whole(self, pieces: Mapping[int, list[Piece]], usage: Usage) -> dict[str, Any]:
        """The answer as one object, from the pieces of each choice."""
        ...


async def respond(
    request: Request, generation: Generation, dialect: Dialect, stream: bool, headers: Mapping[str, str]
) -> Response:
    """Nothing is sent before the engine has shown that it answers; until then failures have a status."""
    try:
        if not stream:
            pieces = await until_gone(request.receive, collect(generation))
            return json_response(dialect.whole(pieces, generation.usage()), headers=headers)
        rest = events(generation, dialect)
        first = await until_gone(request.receive, _first(rest))
        return EventStream(first, rest, headers)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)


async def collect(generation: Generation) -> dict[int, list[Piece]]:
    pieces: dict[int, list[Piece]] = {choice.index: [] for choice in generation.choices}
    with generation:
        async for batch in generation.batches():
            for choice, piece in batch:
                pieces[choice.index].append(piece)
    return pieces


async def events(generation: Generation, dialect: Dialect) -> AsyncGenerator[bytes, None]:
    """A failure before the first event is raised; a later one is an event itself, and no `[DONE]` follows."""
    begun = False
    try:
        with generation:
            async for batch in generation.batches():
                yield b"".join([dialect.chunk(*each) for each in batch]) if batch else KEEP_ALIVE
                begun = True
        yield dialect.usage_chunk(generation.usage()) + DONE
    except NybbleError as error:
        if not begun:
            raise
        yield b"data: " + orjson.dumps(body_of(error)) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(StreamingResponse):
    """Ends its generator, and so the request in the engine, however the connection ends."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(rest, headers={**_HEADERS, **headers})
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._rest):
            with contextlib.suppress(ClientGone):
                await until_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in self._rest:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _first(rest: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(rest)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
