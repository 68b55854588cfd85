"""The checkpoint's chat template, rendered in a sandbox that reaches no objects, with a cap on the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nybble.errors import CheckpointError, InvalidRequest

MAX_RENDERED = 16 * 2**20
"""Characters; a prompt this long fits no context window."""

_MAX_REPEATED = 1024

KWARGS: Mapping[str, type] = {"enable_thinking": bool, "thinking": bool, "date_string": str}
"""What a request may hand to the template, and nothing else."""

_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
"""What a template can end with; all of it means that these messages do not suit it."""

_END = "\ue000nybble-end-of-message\ue001"


class ChatTemplate:
    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self.names_developer = "developer" in source
        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as exc:
            raise CheckpointError(f"chat template: {exc}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """With `continue_final_message` the text ends where the last message does: the model goes on."""
        said = [dict(message) for message in messages]
        if continue_final_message:
            said[-1]["content"] += _END
        given = self._special | dict(kwargs or {})
        text = self._run(messages=said, add_generation_prompt=add_generation_prompt, **given)
        if continue_final_message:
            text, found, _ = text.rpartition(_END)
            if not found:
                raise InvalidRequest("This model's chat template drops the final message.", param="messages")
        return text

    def _run(self, **variables: Any) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                if size > MAX_RENDERED:
                    raise SecurityError("the rendered prompt is too long")
                pieces.append(piece)
        except _FAILURES as exc:
            reason = (str(exc) or type(exc).__name__)[:200]
            raise InvalidRequest(
                f"The chat template refused these messages: {reason}", param="messages"
            ) from None
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The stock sandbox still multiplies strings: `'a' * 3e8` would take 300 MB."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and isinstance(left, str) and isinstance(right, int):
            allowed = len(left) * right <= _MAX_REPEATED
        else:
            allowed = operator != "**" and isinstance(left, int | float) and isinstance(right, int | float)
        if not allowed:
            raise SecurityError(f"operator {operator} is not allowed on these values")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML characters, which templates do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
