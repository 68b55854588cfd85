"""One streaming request to an OpenAI-compatible server, and when each piece of the answer arrived."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import orjson

from nybble.errors import UsageError

MESSAGE_LIMIT = 300


class RequestRefused(Exception):
    """The server answered, but not with a stream. `status` is the HTTP status, 200 for an error event."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request. `arrivals` are the times of the chunks that carried text."""

    sent: float
    arrivals: tuple[float, ...]
    prompt_tokens: int
    tokens: int
    finish: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first; a single token has no rate."""
        span = self.arrivals[-1] - self.arrivals[0]
        return (self.tokens - 1) / span if self.tokens > 1 and span > 0 else None


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to ask. `extras` are body fields beyond the standard ones, such as `ignore_eos`."""

    url: str
    model: str
    chat: bool
    max_tokens: int
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"{self.url}/v1/" + ("chat/completions" if self.chat else "completions")

    def body(self, prompt: str) -> bytes:
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extras,
        }
        if self.chat:
            asked["messages"] = [{"role": "user", "content": prompt}]
        else:
            asked["prompt"] = prompt
        return orjson.dumps(asked)


def connect(api_key: str | None, connections: int, timeout: float = 600.0) -> httpx2.AsyncClient:
    """A client with room for this many streams at once; it asks no proxy."""
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx2.AsyncClient(
        headers=headers, limits=limits, timeout=httpx2.Timeout(timeout, connect=5.0), trust_env=False
    )


async def models(client: httpx2.AsyncClient, url: str) -> list[dict[str, Any]]:
    """The cards of `/v1/models`. Raises `UsageError` when there is no such server."""
    try:
        response = await client.get(f"{url}/v1/models")
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"{url}: not reachable: {reason}", hint="start one with `nybble serve`") from None
    if response.status_code in (401, 403):
        raise UsageError(f"{url}: the server wants a key", hint="give it with --api-key or OPENAI_API_KEY")
    if response.status_code == 503:
        raise UsageError(f"{url}: the server is not ready", hint="`nybble health` says when it is")
    try:
        cards = orjson.loads(response.content)["data"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        cards = None
    if response.status_code != 200 or not isinstance(cards, list) or not cards:
        found = f"HTTP {response.status_code}, no model listed"
        raise UsageError(f"{url}/v1/models: {found}", hint="is it a model server?")
    return cards


async def ask(client: httpx2.AsyncClient, target: Target, prompt: str) -> Sample:
    """Raises `RequestRefused` when the server says no, `httpx2.TransportError` when the line breaks."""
    arrivals: list[float] = []
    usage: Mapping[str, int] = {}
    finish: str | None = None
    sent = time.perf_counter()
    async with client.stream("POST", target.endpoint, content=target.body(prompt)) as response:
        if response.status_code != 200:
            raise RequestRefused(response.status_code, reason(await response.aread()))
        async for event in events(response):
            now = time.perf_counter()
            if "error" in event:
                raise RequestRefused(200, reason(orjson.dumps(event)))
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                finish = choice.get("finish_reason") or finish
                if text_of(choice):
                    arrivals.append(now)
    if not arrivals:
        raise RequestRefused(200, "the answer is empty")
    tokens = usage.get("completion_tokens", len(arrivals))
    return Sample(sent, tuple(arrivals), usage.get("prompt_tokens", 0), tokens, finish)


async def events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` event, `[DONE]` and comments left out."""
    rest = b""
    async for piece in response.aiter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            data = line.strip().removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield orjson.loads(data)


def text_of(choice: Mapping[str, Any]) -> str:
    """What this chunk adds to the answer, reasoning included."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def reason(body: bytes) -> str:
    """The message of an OpenAI-shaped error, or the body's beginning."""
    try:
        return str(orjson.loads(body)["error"]["message"])[:MESSAGE_LIMIT]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:MESSAGE_LIMIT].decode(errors="replace")
