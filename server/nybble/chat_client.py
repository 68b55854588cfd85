"""A conversation with a server: keeps the messages, streams the answers, counts the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import orjson

from nybble.bench.client import RequestRefused, events, reason, text_of


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. `first` and `seconds` count from the moment of asking."""

    text: str
    tokens: int
    first: float
    seconds: float
    finish: str | None

    @property
    def rate(self) -> float:
        """Tokens a second after the first; 0 when there is no second token."""
        span = self.seconds - self.first
        return (self.tokens - 1) / span if self.tokens > 1 and span > 0 else 0.0


@dataclass(slots=True)
class Conversation:
    """`ask` adds the question and the answer; what fails or is interrupted is taken back."""

    client: httpx2.AsyncClient
    url: str
    model: str
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    async def ask(self, question: str, say: Callable[[str], None]) -> Turn:
        """`say` gets each piece as it arrives. Raises `RequestRefused` and `httpx2.TransportError`."""
        asked = [*self.messages, {"role": "user", "content": question}]
        turn = await self._stream(asked, say)
        self.messages = [*asked, {"role": "assistant", "content": turn.text}]
        return turn

    async def _stream(self, messages: list[dict[str, str]], say: Callable[[str], None]) -> Turn:
        pieces: list[str] = []
        first, finish, tokens = 0.0, None, 0
        began = time.perf_counter()
        async with self.client.stream(
            "POST", f"{self.url}/v1/chat/completions", content=self._body(messages)
        ) as response:
            if response.status_code != 200:
                raise RequestRefused(response.status_code, reason(await response.aread()))
            async for event in events(response):
                if "error" in event:
                    raise RequestRefused(200, reason(orjson.dumps(event)))
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event.get("choices") or ():
                    finish = choice.get("finish_reason") or finish
                    if text := text_of(choice):
                        first = first or time.perf_counter() - began
                        pieces.append(text)
                        say(text)
        return Turn("".join(pieces), tokens or len(pieces), first, time.perf_counter() - began, finish)

    def _body(self, messages: list[dict[str, str]]) -> bytes:
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return orjson.dumps({"model": self.model, "messages": messages, **streamed, **self.options})
