"""POST /tokenize and /detokenize, GET /tokenizer_info: counting and scoring without the model's files."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from nybble.api.extras import check_extras
from nybble.api.failures import json_response
from nybble.api.lifecycle import Loaded
from nybble.api.params import token_ids
from nybble.api.parsing import LenientRoute
from nybble.api.prompts import Chat, encode, read_chat
from nybble.api.schema import DetokenizeRequest, TokenizeRequest
from nybble.api.service import check_model, service_of
from nybble.errors import InvalidRequest

router = APIRouter(route_class=LenientRoute, tags=["tokens"])


@router.post("/tokenize", summary="Token ids of a text or a conversation")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    loaded = service_of(request).ready()
    headers = check_extras(body)
    check_model(loaded, body.model)
    ids = await _ids(body, loaded)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": loaded.info.max_model_len}
    return json_response(answer, headers=headers)


async def _ids(body: TokenizeRequest, loaded: Loaded) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: give either prompt or messages.", param="prompt")
    if body.messages is not None:
        given = (body.add_generation_prompt, body.continue_final_message, body.chat_template_kwargs)
        return (await read_chat(Chat(body.messages, *given), loaded)).ids
    text = body.prompt or ""
    return (await encode(text, loaded, "prompt", add_special_tokens=body.add_special_tokens is not False)).ids


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    service = service_of(request)
    loaded = service.ready()
    headers = check_extras(body)
    check_model(loaded, body.model)
    ids = token_ids(body.tokens, loaded.info.vocab_size, "tokens", service.config.max_body_bytes)
    text = await asyncio.to_thread(loaded.tokenizer.decode, ids)
    return json_response({"prompt": text}, headers=headers)


@router.get("/tokenizer_info", summary="Special tokens and the chat template")
async def tokenizer_info(request: Request) -> Response:
    tokenizer = service_of(request).ready().tokenizer
    template = tokenizer.chat_template
    answer: dict[str, Any] = {**tokenizer.config, **tokenizer.special}
    return json_response(answer | {"chat_template": template.source if template else None})
