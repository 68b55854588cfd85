"""Token probabilities in the two dialects of the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nybble.api.choice import Mark
from nybble.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for a probability of zero, whose logarithm JSON cannot carry."""


def chat_logprobs(marks: Sequence[Mark], tokenizer: Tokenizer, top: int) -> dict[str, Any]:
    content = [
        {
            **_chat_token(mark.token, mark.scores.logprob, tokenizer),
            "top_logprobs": [_chat_token(token, score, tokenizer) for token, score in mark.scores.top[:top]],
        }
        for mark in marks
        if mark.scores is not None
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: int, score: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": token_text(raw), "logprob": finite(score), "bytes": list(raw)}


def completion_logprobs(marks: Sequence[Mark], tokenizer: Tokenizer, top: int) -> dict[str, Any]:
    """The first token of an echoed prompt has no probability."""
    return {
        "tokens": [token_text(tokenizer.token_bytes(mark.token)) for mark in marks],
        "token_logprobs": [finite(mark.scores.logprob) if mark.scores else None for mark in marks],
        "top_logprobs": [_by_text(mark, tokenizer, top) for mark in marks],
        "text_offset": [mark.offset for mark in marks],
    }


def _by_text(mark: Mark, tokenizer: Tokenizer, top: int) -> dict[str, float] | None:
    """The chosen token is always there; of two tokens with one text the likelier counts."""
    if mark.scores is None:
        return None
    found: dict[str, float] = {}
    for token, score in (*mark.scores.top[:top], (mark.token, mark.scores.logprob)):
        text = token_text(tokenizer.token_bytes(token))
        found[text] = max(finite(score), found.get(text, LOWEST))
    return found


def token_text(raw: bytes) -> str:
    """A token that cuts a character has no text; it is shown by its bytes, as OpenAI does."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(score: float) -> float:
    return score if score >= LOWEST else LOWEST
