"""Every failure leaves in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from nybble.errors import NybbleError

_MAX_MESSAGE = 400
_WORDS = {404: "Not found", 405: "Method not allowed"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,120}")


def error_body(message: str, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    clean = message.encode("utf-8", "replace").decode()[:_MAX_MESSAGE]
    return {"error": {"message": clean, "type": type, "param": param, "code": code}}


def body_of(error: NybbleError) -> dict[str, Any]:
    message = f"{error.message} {error.hint}" if error.hint else error.message
    return error_body(message, error.type, error.code, error.param)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def error_response(error: NybbleError) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body_of(error), error.status, headers)


def internal_error() -> Response:
    """Says nothing about the inside; the log has the rest."""
    return json_response(
        error_body("The server had an error while processing your request.", "server_error"), 500
    )


def add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(NybbleError, _on_own)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_own(request: Request, error: Exception) -> Response:
    assert isinstance(error, NybbleError)
    return error_response(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = _first(error.errors())
    return json_response(error_body(message, "invalid_request_error", None, param), 400)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{_WORDS.get(error.status_code, error.detail)}: {request.method} {request.scope['path'][:100]}"
    content = error_body(
        what, "invalid_request_error", _WORDS.get(error.status_code, "").lower().replace(" ", "_") or None
    )
    return json_response(content, error.status_code, error.headers)


def _first(errors: Sequence[Any]) -> tuple[str, str | None]:
    """The first complaint, without the value that caused it: a value may be megabytes."""
    found = errors[0]
    if found["type"] == "json_invalid":
        return f"The body is not valid JSON: {found['ctx']['error']}", None
    param = _path(found["loc"])
    if param is None:
        return "The body must be a JSON object, sent as application/json.", None
    return f"{param}: {found['msg'].removeprefix('Value error, ')}", param


def _path(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "role") as messages[0].role."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path if _PLAIN_NAME.fullmatch(path) else None
