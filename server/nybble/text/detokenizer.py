"""Tokens to text as they come: bytes are joined and cut only at the ends of UTF-8 characters."""

from __future__ import annotations

import codecs

from nybble.text.tokenizer import Tokenizer

_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """`"".join(push(t) for t in tokens) + flush()` equals the whole text, whatever the tokens cut through.

    Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = _decoder("replace")

    def push(self, token: int) -> str:
        if self._tokenizer.is_special(token):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Bytes of a character that was never completed come out as one replacement character."""
        return self._decoder.decode(b"", final=True)
