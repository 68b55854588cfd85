"""Bodies are parsed by orjson: NaN, infinities, bad UTF-8, lone surrogates and deep nesting end as a 400."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


class StrictRequest(Request):
    async def json(self) -> Any:
        return orjson.loads(await self.body())


class LenientRoute(APIRoute):
    """Strict about JSON, lenient about a missing or wrong Content-Type: there is only one format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            others = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            scope = {**request.scope, "headers": [*others, (b"content-type", b"application/json")]}
            return await handler(StrictRequest(scope, request.receive))

        return handle
