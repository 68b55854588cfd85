"""Pure ASGI layers around every route: ids, counting, the last catch, readiness, and the size of bodies."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.api.failures import error_response, internal_error
from nybble.api.service import Service
from nybble.errors import BodyTimeout, HeadersTooLarge, NybbleError, PayloadTooLarge

log = logging.getLogger("nybble.api")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:/+=-]{1,128}")
MAX_HEADER_BYTES = 64 * 1024
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})


class Access:
    """Outermost. Gives each request an id and each response its header, counts, and lets no exception out."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        began = time.monotonic()
        scope["state"] = {**scope.get("state", {}), "arrived": began}
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception:
            log.exception("request %s failed", request_id.decode())
            if not status:
                await internal_error()(scope, receive, tagged)
            else:
                raise
        finally:
            self._count(scope, status, time.monotonic() - began)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        """The handler is a route's pattern, never a path: a client must not be able to make up series."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        handler = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.http_requests.labels(method, handler, str(status or 499)).inc()
        self._metrics.http_seconds.labels(method, handler).observe(seconds)


class Gate:
    """Answers for the model while there is none, and counts what must finish before the server may stop."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._lifecycle = service.lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(("/v1/", "/tokenize", "/detokenize")):
            await self._app(scope, receive, send)
            return
        try:
            self._lifecycle.check()
        except NybbleError as error:
            await error_response(error)(scope, receive, send)
            return
        self._lifecycle.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._lifecycle.in_flight -= 1


class RequestLimit:
    """Reads the body before the route runs: at most so many bytes, in at most so many seconds.

    What is somewhat too large is read to its end and dropped: a client that is still sending sees no answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._patience = 8 * max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _check_headers(scope)
            self._check_declared(scope)
            async with asyncio.timeout(self._timeout):
                body = await self._read(receive)
        except TimeoutError:
            await _refuse(BodyTimeout("The body took too long to arrive."), scope, receive, send)
        except (HeadersTooLarge, PayloadTooLarge) as error:
            await _refuse(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check_declared(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and (len(value) > 18 or int(value) > self._patience):
                raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """None if the client went away."""
        parts: list[bytes] = []
        size = 0
        more = True
        while more and size <= self._patience:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            more = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
        if size > self._max_bytes:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is larger than {self._max_bytes} bytes.")


def _check_headers(scope: Scope) -> None:
    """The parser stops what does not fit into one read; this is for what does."""
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever the connection says: that is how a disconnect is noticed."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _refuse(error: NybbleError, scope: Scope, receive: Receive, send: Send) -> None:
    """The rest of the body is unread, so the connection cannot be used again."""
    response = error_response(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()
