"""What a client may send. Fields outside these lists are refused or named in a header (`extras`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

_INT64 = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIASED = 1024
MAX_MESSAGES = 4096

Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
Stop = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    ),
]
TokenIds = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "integer"}})]
Biases = Annotated[Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})]
Content = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
    ),
]
"""Checked by hand: a union in pydantic would report every branch for every item."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)


class StreamOptions(_Record):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(_Record):
    """The fields that both endpoints share."""

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    stop: Stop = None
    stop_token_ids: TokenIds = None
    logit_bias: Biases = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(Sampling):
    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    add_special_tokens: bool | None = None


class Message(_Record):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Any = None
    function_call: Any = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(Sampling):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Any = None


class TokenizeRequest(_Record):
    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Any = None


class DetokenizeRequest(_Record):
    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: TokenIds


class ErrorBody(BaseModel):
    """The inside of every answer that is not a success."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody
