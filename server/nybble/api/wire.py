"""What every chunk and every answer of a generation has in common, encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from nybble.api.generation import Generation, Usage
from nybble.api.schema import StreamOptions


@dataclass(frozen=True, slots=True)
class UsagePolicy:
    """`included`: usage in a last chunk, null in the others. `continuous`: in each that of its choice."""

    included: bool
    continuous: bool

    @property
    def tail(self) -> bytes:
        """The field in a chunk whose bytes are fixed."""
        return b',"usage":null' if self.included else b""

    def field(self, usage: Callable[[], Usage]) -> dict[str, Any]:
        if self.continuous:
            return {"usage": usage().fields()}
        return {"usage": None} if self.included else {}


def usage_policy(options: StreamOptions | None) -> UsagePolicy:
    if options is None:
        return UsagePolicy(False, False)
    return UsagePolicy(
        bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)
    )


@dataclass(frozen=True, slots=True)
class Envelope:
    """`fields` of the whole answer; `event_head` is a chunk's beginning up to where its choices start."""

    fields: Mapping[str, Any]
    event_head: bytes

    @classmethod
    def of(cls, generation: Generation, kind: str) -> Envelope:
        """A chunk of a chat is an object of its own kind; one of a completion is not."""
        fields = {
            "id": generation.plan.id,
            "object": kind,
            "created": generation.created,
            "model": generation.plan.model,
            "system_fingerprint": generation.loaded.fingerprint,
        }
        chunk = fields | {"object": f"{kind}.chunk" if kind == "chat.completion" else kind}
        return cls(fields, b"data: " + orjson.dumps(chunk)[:-1] + b",")

    def event(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> bytes:
        return self.event_head + orjson.dumps({"choices": choices, **usage})[1:] + b"\n\n"
