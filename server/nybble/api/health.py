"""Probes. Liveness says whether to restart the process, readiness whether to send it requests."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from nybble.api.failures import json_response
from nybble.api.service import service_of

RETRY_AFTER = {"Retry-After": "2"}

router = APIRouter(tags=["probes"])


@router.get("/livez", summary="200 while the event loop and the engine's loop turn")
async def livez(request: Request) -> Response:
    lifecycle = service_of(request).lifecycle
    alive = lifecycle.failure is None and not lifecycle.stalled()
    return json_response({"status": "alive" if alive else "dead"}, 200 if alive else 503)


@router.get("/readyz", summary="200 while requests are welcome")
@router.get("/health", summary="The same as /readyz")
@router.get("/ping", summary="The same as /readyz")
async def readyz(request: Request) -> Response:
    lifecycle = service_of(request).lifecycle
    state = lifecycle.state
    if state == "ready":
        return json_response({"status": "ready"})
    content: dict[str, object] = {"status": state}
    if state in ("loading", "warming"):
        content |= {"phase": lifecycle.phase, "progress": round(lifecycle.fraction, 3)}
    if state == "dead":
        content["reason"] = lifecycle.reason()
    return json_response(content, 503, RETRY_AFTER)


@router.get("/metrics", summary="For Prometheus")
async def metrics(request: Request, aliases: str = "1") -> Response:
    """`aliases=0` leaves out the series under the names of other engines."""
    exposition = service_of(request).metrics.exposition
    content, content_type = exposition(request.headers.get("accept", ""), aliases=aliases != "0")
    return Response(content, headers={"Content-Type": content_type})
