"""What is served here: models, version, and an index for people who open the root."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

import nybble
from nybble.api.failures import json_response
from nybble.api.lifecycle import Loaded
from nybble.api.service import check_model, service_of

router = APIRouter(tags=["catalog"])


@router.get("/v1/models", summary="List the models")
async def list_models(request: Request) -> Response:
    loaded = service_of(request).ready()
    return json_response({"object": "list", "data": [card(name, loaded) for name in loaded.names]})


@router.get("/v1/models/{name:path}", summary="Describe a model")
async def get_model(name: str, request: Request) -> Response:
    loaded = service_of(request).ready()
    return json_response(card(check_model(loaded, name), loaded))


@router.get("/version", summary="Version of the server")
async def version() -> Response:
    return json_response({"version": nybble.__version__})


@router.get("/", summary="Where to go from here")
async def index(request: Request) -> Response:
    links = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics", "/readyz", "/openapi.json")
    return json_response({"name": "nybble", "version": nybble.__version__, "links": list(links)})


def card(name: str, loaded: Loaded) -> dict[str, Any]:
    """OpenAI's fields, the two names under which clients look for the context length, and our own facts."""
    info = loaded.info
    return {
        "id": name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "nybble",
        "root": loaded.names[0],
        "parent": None,
        "max_model_len": info.max_model_len,
        "context_length": info.max_model_len,
        "meta": {
            "family": info.family,
            "parameters": info.parameters,
            "vocab_size": info.vocab_size,
            "weight_bytes": dict(info.weight_bytes),
            "quantization": {"scheme": info.quantization, "bits_per_weight": info.bits},
            "device": info.device,
            "dtype": info.dtype,
            "kernels": dict(info.kernels),
        },
    }
