"""The checkpoint's tokenizer: text to ids, and each id to the exact bytes it stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from nybble.errors import CheckpointError, InvalidRequest
from nybble.text.template import ChatTemplate
from nybble_models.errors import ModelError
from nybble_models.tokenizer import load_tokenizer

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and for each the character of the text at which it starts."""

    ids: tuple[int, ...]
    offsets: tuple[int, ...]


class Tokenizer:
    """Thread-safe: nothing changes after construction but a cache of token bytes."""

    def __init__(
        self, core: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None = None
    ) -> None:
        self._core = core
        self.config = config
        self.special = {name: text for name in _SPECIAL_NAMES if (text := _content(config.get(name)))}
        self.chat_template = ChatTemplate(template, self.special) if template else None
        self._added = {
            i: (token.content, token.special) for i, token in core.get_added_tokens_decoder().items()
        }
        self._byte_level = b"ByteLevel" in core.decoder.__getstate__() if core.decoder else False
        self._bytes: dict[int, bytes] = {}
        self.longest = max((len(token.encode()) for token in core.get_vocab()), default=1)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Raises `CheckpointError` in one line."""
        try:
            core = load_tokenizer(directory)
        except ModelError as error:
            raise CheckpointError(str(error), hint=error.hint) from None
        config = _read_json(directory / "tokenizer_config.json")
        return cls(core, config, _read_template(directory, config))

    def __len__(self) -> int:
        return self._core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """BOS is added where the tokenizer's own post-processor adds it."""
        try:
            encoding = self._core.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise InvalidRequest("The text holds characters that are not valid Unicode.") from None
        return Encoded(tuple(encoding.ids), tuple(start for start, _ in encoding.offsets))

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are kept."""
        return self._core.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """What the id stands for inside a text; a special token stands for its name."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._spell(token)
        return found

    def is_special(self, token: int) -> bool:
        return token in self._added and self._added[token][1]

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token][0].encode()
        piece = self._core.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return (
                bytes(_BYTE_OF[char] for char in piece)
                if all(c in _BYTE_OF for c in piece)
                else piece.encode()
            )
        if match := _BYTE_FALLBACK.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, reversed."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + rank): byte for rank, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _content(token: Any) -> str | None:
    """Special tokens are written as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise CheckpointError(f"{path}: not JSON: {exc}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(loaded).__name__}")
    return loaded


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    return found if isinstance(found, str) else _default_of(found)


def _default_of(named: Any) -> str | None:
    """Some folders hold a list of named templates."""
    rows: Iterable[Any] = named if isinstance(named, list) else ()
    by_name = {row.get("name"): row.get("template") for row in rows if isinstance(row, dict)}
    found = by_name.get("default")
    return found if isinstance(found, str) else None
