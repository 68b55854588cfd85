"""POST /v1/chat/completions."""

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
from nybble.api.logprobs import chat_logprobs
from nybble.api.params import choices, fit, sampling, stop_strings
from nybble.api.parsing import LenientRoute
from nybble.api.prompts import Chat, read_chat
from nybble.api.schema import ChatRequest
from nybble.api.service import Service, check_model, service_of
from nybble.api.stream import respond
from nybble.api.wire import Envelope, usage_policy
from nybble.errors import InvalidRequest

router = APIRouter(route_class=LenientRoute, tags=["generation"])


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    service = service_of(request)
    loaded = service.ready()
    headers = check_extras(body)
    generation = Generation(service, loaded, await plan(body, service, loaded), request.state.arrived)
    return await respond(request, generation, ChatDialect(generation, body), bool(body.stream), headers)


async def plan(body: ChatRequest, service: Service, loaded: Loaded) -> Plan:
    model = check_model(loaded, body.model)
    n = choices(body, service.config)
    stops = stop_strings(body.stop)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if asked == 0:
        raise InvalidRequest("max_tokens: must be at least 1.", param="max_tokens")
    params = sampling(body, service.config, loaded.info.vocab_size)
    chat = Chat(
        body.messages, body.add_generation_prompt, body.continue_final_message, body.chat_template_kwargs
    )
    prompt = await read_chat(chat, loaded)
    fitted = fit(params, prompt.ids, asked, loaded.info.max_model_len, "messages")
    return Plan(f"chatcmpl-{uuid.uuid4().hex}", model, [prompt], [fitted], n, stops)


class ChatDialect:
    """The role goes out with the first piece of each choice, not before: clients time the first chunk."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation = generation
        self._tokenizer = generation.loaded.tokenizer
        self._top = body.top_logprobs or 0 if body.logprobs else None
        self._usage = usage_policy(body.stream_options)
        self._envelope = Envelope.of(generation, "chat.completion")
        self._tail = b'},"logprobs":null,"finish_reason":null}]' + self._usage.tail + b"}\n\n"
        self._heads = [
            self._envelope.event_head + b'"choices":[{"index":%d,"delta":{' % choice.index
            for choice in generation.choices
        ]
        self._unnamed = {choice.index for choice in generation.choices}

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        if piece.finish is None and self._top is None and not self._usage.continuous:
            event = self._heads[choice.index] + b'"content":' + orjson.dumps(piece.text) + self._tail
        else:
            delta = {"content": piece.text} if piece.text else {}
            event = self._event(choice, delta, piece)
        if choice.index in self._unnamed:
            self._unnamed.discard(choice.index)
            return self._event(choice, {"role": "assistant", "content": ""}, Piece("")) + event
        return event

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope.event([], {"usage": usage.fields()}) if self._usage.included else b""

    def whole(self, pieces: Mapping[int, list[Piece]], usage: Usage) -> dict[str, Any]:
        answers = [self._answer(index, Piece.join(parts)) for index, parts in pieces.items()]
        return {**self._envelope.fields, "choices": answers, "usage": usage.fields()}

    def _event(self, choice: Choice, delta: dict[str, str], piece: Piece) -> bytes:
        scores = self._scores(piece) if piece.marks else None
        part = {"index": choice.index, "delta": delta, "logprobs": scores, "finish_reason": piece.finish}
        return self._envelope.event(
            [part], self._usage.field(lambda: self._generation.usage_of(choice, piece))
        )

    def _answer(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._scores(piece),
            "finish_reason": piece.finish,
        }

    def _scores(self, piece: Piece) -> dict[str, Any] | None:
        return None if self._top is None else chat_logprobs(piece.marks, self._tokenizer, self._top)
