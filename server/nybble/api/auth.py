"""API keys: everything is closed but a short list of paths."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.api.failures import error_response
from nybble.errors import Unauthorized

OPEN = frozenset({"/livez", "/readyz", "/health", "/ping"})
"""Probes carry no key. `/metrics` joins them by a setting."""


class Auth:
    """Decides on `scope["path"]` alone, before routing: a new route is closed until it is listed as open."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], metrics_open: bool) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)
        self._open = OPEN | {"/metrics"} if metrics_open else OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in self._open or self._knows(scope):
            await self._app(scope, receive, send)
            return
        await error_response(Unauthorized("Incorrect API key provided."))(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        """Compares with every key, whichever matches, so that time tells nothing."""
        digest = _digest(_token(scope))
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _token(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return bytes(token).strip() if scheme.lower() == b"bearer" else b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
