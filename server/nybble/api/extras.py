"""Parameters outside the schema: what would change the answer is refused, the rest named in a header."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from nybble.errors import InvalidRequest

HEADER = "x-ignored-params"
_MAX_NAMES = 32
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "suffix": ("",),
    "best_of": (1,),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "chat_template": (),
    "documents": ([],),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": (),
    "grammar": (),
    "ebnf": (),
    "json_schema": (),
    "structural_tag": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "prompt_logprobs": (),
    "logits_processors": ([],),
    "lora_path": (),
    "stop_regex": ([], ""),
    "thinking_token_budget": (),
}
"""Name, and the values that ask for nothing. To serve one of these without doing it would be wrong."""


def check_extras(body: BaseModel) -> dict[str, str]:
    """Refuse what would change the answer; the header that names what was ignored, or nothing."""
    for name, value in (body.model_extra or {}).items():
        if name in REFUSED and not _neutral(value, REFUSED[name]):
            raise InvalidRequest(f"The parameter {name} is not supported by this server.", param=name)
    names = [name for name in dict.fromkeys(_ignored(body)) if name not in REFUSED]
    return {HEADER: ",".join(names[:_MAX_NAMES])} if names else {}


def _neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(value == each and type(value) in (type(each), float) for each in neutral)


def _ignored(body: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, value in (body.model_extra or {}).items():
        if value is not None:
            yield prefix + (name if _NAME.fullmatch(name) else "?")
    for name in type(body).model_fields:
        value = getattr(body, name)
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, BaseModel):
                yield from _ignored(part, f"{prefix}{name}.")
