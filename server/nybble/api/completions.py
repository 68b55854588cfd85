"""POST /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from nybble.api.choice import Choice, Piece
from nybble.api.extras import check_extras
from nybble.api.generation import Generation, Plan, Usage
from nybble.api.lifecycle import Loaded
from nybble.api.logprobs import completion_logprobs
from nybble.api.params import choices, fit, sampling, stop_strings
from nybble.api.parsing import LenientRoute
from nybble.api.prompts import read_prompts
from nybble.api.schema import CompletionRequest
from nybble.api.service import Service, check_model, service_of
from nybble.api.stream import respond
from nybble.api.wire import Envelope, usage_policy
from nybble.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=LenientRoute, tags=["generation"])


@router.post("/v1/completions", summary="Continue a text")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    service = service_of(request)
    loaded = service.ready()
    headers = check_extras(body)
    generation = Generation(service, loaded, await plan(body, service, loaded), request.state.arrived)
    dialect = CompletionDialect(generation, body)
    return await respond(request, generation, dialect, bool(body.stream), headers)


async def plan(body: CompletionRequest, service: Service, loaded: Loaded) -> Plan:
    model = check_model(loaded, body.model)
    n = choices(body, service.config)
    stops = stop_strings(body.stop)
    asked = body.max_tokens if body.max_tokens is not None else DEFAULT_MAX_TOKENS
    if asked == 0 and not body.echo:
        raise InvalidRequest("max_tokens: must be at least 1, or 0 together with echo.", param="max_tokens")
    params = sampling(body, service.config, loaded.info.vocab_size)
    prompts = await read_prompts(
        body.prompt,
        loaded,
        service.config.max_prompts,
        add_special_tokens=body.add_special_tokens is not False,
        echo=bool(body.echo),
    )
    fitted = [fit(params, prompt.ids, asked, loaded.info.max_model_len, "prompt") for prompt in prompts]
    return Plan(f"cmpl-{uuid.uuid4().hex}", model, prompts, fitted, n, stops, bool(body.echo))


class CompletionDialect:
    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        self._generation = generation
        self._tokenizer = generation.loaded.tokenizer
        self._top = body.logprobs
        self._usage = usage_policy(body.stream_options)
        self._envelope = Envelope.of(generation, "text_completion")
        tail = b',"logprobs":null,"finish_reason":null}]' + self._usage.tail + b"}\n\n"
        self._tail = tail
        self._heads = [
            self._envelope.event_head + b'"choices":[{"index":%d,"text":' % choice.index
            for choice in generation.choices
        ]

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        if piece.finish is None and self._top is None and not self._usage.continuous:
            return self._heads[choice.index] + orjson.dumps(piece.text) + self._tail
        usage = self._usage.field(lambda: self._generation.usage_of(choice, piece))
        return self._envelope.event([self._choice(choice.index, piece)], usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope.event([], {"usage": usage.fields()}) if self._usage.included else b""

    def whole(self, pieces: Mapping[int, list[Piece]], usage: Usage) -> dict[str, Any]:
        answers = [self._choice(index, Piece.join(parts)) for index, parts in pieces.items()]
        return {**self._envelope.fields, "choices": answers, "usage": usage.fields()}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        scores = None if self._top is None else completion_logprobs(piece.marks, self._tokenizer, self._top)
        return {"index": index, "text": piece.text, "logprobs": scores, "finish_reason": piece.finish}
