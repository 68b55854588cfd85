"""The prompts of a request as token ids: texts are encoded, chats rendered by the checkpoint's template."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.api.lifecycle import Loaded
from nybble.api.params import token_ids
from nybble.api.schema import Message
from nybble.errors import ContextLengthExceeded, InvalidRequest
from nybble.text.template import KWARGS
from nybble.text.tokenizer import Encoded

_INLINE = 2048
"""Characters that are encoded on the event loop; longer texts go to a worker thread."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what an echo shows, `offsets` where each token starts in it; a chat is never echoed."""

    ids: tuple[int, ...]
    text: str = ""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """What a template needs to turn messages into a text."""

    messages: Sequence[Message]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    kwargs: Any = None


async def read_prompts(
    value: Any, loaded: Loaded, at_most: int, *, add_special_tokens: bool, echo: bool
) -> list[Prompt]:
    """A text, a list of texts, a list of ids, or a list of lists of ids."""
    many = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    items: list[Any] = value if many else [value]
    if len(items) > at_most:
        raise InvalidRequest(
            f"prompt: at most {at_most} prompts are allowed, got {len(items)}.", param="prompt"
        )
    if many and not all(type(item) is type(items[0]) for item in items):
        raise InvalidRequest("prompt: texts and token ids must not be mixed.", param="prompt")
    return [
        await _read_text(item, loaded, add_special_tokens)
        if isinstance(item, str)
        else _read_ids(item, loaded, echo)
        for item in items
    ]


async def _read_text(text: str, loaded: Loaded, add_special_tokens: bool) -> Prompt:
    encoded = await encode(text, loaded, "prompt", add_special_tokens=add_special_tokens)
    if not encoded.ids:
        raise InvalidRequest("prompt: must not be empty.", param="prompt")
    return Prompt(encoded.ids, text, encoded.offsets)


def _read_ids(value: Any, loaded: Loaded, echo: bool) -> Prompt:
    """Ids are taken as they are: nothing is added in front."""
    limit = loaded.info.max_model_len
    if isinstance(value, list) and len(value) > limit:
        raise ContextLengthExceeded.of(limit, len(value), 0, "prompt")
    if not isinstance(value, list) or not value:
        raise InvalidRequest("prompt: must be a text or token ids, and not empty.", param="prompt")
    ids = token_ids(value, loaded.info.vocab_size, "prompt", limit)
    return Prompt(ids, *_spell(ids, loaded)) if echo else Prompt(ids)


def _spell(ids: Sequence[int], loaded: Loaded) -> tuple[str, tuple[int, ...]]:
    """The text of the ids, special tokens included, and where each starts."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, offsets = "", []
    for token in ids:
        offsets.append(len(text))
        text += decoder.decode(loaded.tokenizer.token_bytes(token))
    return text + decoder.decode(b"", final=True), tuple(offsets)


async def encode(text: str, loaded: Loaded, param: str, *, add_special_tokens: bool) -> Encoded:
    """Refuses by size alone what cannot fit, before spending time on it."""
    limit = loaded.info.max_model_len
    least = len(text) // loaded.tokenizer.longest
    if least > limit:
        raise ContextLengthExceeded.of(limit, least, 0, param)

    def work() -> Encoded:
        return loaded.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    return work() if len(text) <= _INLINE else await asyncio.to_thread(work)


async def read_chat(chat: Chat, loaded: Loaded) -> Prompt:
    """The template writes the special tokens itself, so none are added."""
    text = await asyncio.to_thread(render, chat, loaded)
    return Prompt((await encode(text, loaded, "messages", add_special_tokens=False)).ids)


def render(chat: Chat, loaded: Loaded) -> str:
    template = loaded.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            "This model has no chat template.", hint="Use /v1/completions.", param="messages"
        )
    last_is_answer = chat.messages[-1].role == "assistant"
    if chat.continue_final_message and (chat.add_generation_prompt or not last_is_answer):
        raise InvalidRequest(
            "continue_final_message: needs an assistant's last message, and add_generation_prompt false.",
            param="continue_final_message",
        )
    return template.render(
        [_plain(message, i, template.names_developer) for i, message in enumerate(chat.messages)],
        add_generation_prompt=chat.add_generation_prompt is not False and not chat.continue_final_message,
        continue_final_message=bool(chat.continue_final_message),
        kwargs=_template_kwargs(chat.kwargs),
    )


def _plain(message: Message, index: int, names_developer: bool) -> dict[str, str]:
    where = f"messages[{index}]"
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise InvalidRequest("Tools are not supported by this server.", param=f"{where}.role")
    role = "system" if message.role == "developer" and not names_developer else message.role
    plain = {"role": role, "content": _text_of(message, where)}
    return plain | {"name": message.name} if message.name is not None else plain


def _text_of(message: Message, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None and message.role == "assistant":
        return ""
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content: must be a text or a list of parts.", param=f"{where}.content")
    return "\n".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(f'{where}: only parts of type "text" are supported.', param=where)
    text: str = part["text"]
    return text


def _template_kwargs(value: Any) -> Mapping[str, Any]:
    """Only names on the list: a free hand over the template's variables is a way to attack the server."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest("chat_template_kwargs: must be an object.", param="chat_template_kwargs")
    for name, given in value.items():
        if name not in KWARGS or type(given) is not KWARGS[name] or len(str(given)) > 64:
            allowed = ", ".join(f"{known} ({kind.__name__})" for known, kind in KWARGS.items())
            raise InvalidRequest(
                f"chat_template_kwargs: allowed are {allowed}.", param="chat_template_kwargs"
            )
    return value
