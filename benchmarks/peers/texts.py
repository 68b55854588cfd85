"""What every subject is asked: the same texts, with known token counts, none longer than it is said to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from nybble.bench.words import prompt

STORY = (
    "The history of the city begins with a small settlement on the river, where traders met in the spring. "
    * 4
)
QUESTION, EXPECTED = "The capital of France is", "Paris"
STORY_TOKENS, STREAM_TOKENS = 48, 24


@dataclass(frozen=True)
class Text:
    text: str
    ids: tuple[int, ...]


class Texts:
    """`length` is that of the long prompts, in tokens of this tokenizer."""

    def __init__(self, directory: Path, length: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.length = length
        self.question = self._cut(QUESTION, len(QUESTION))
        self.story = self._cut(STORY, min(STORY_TOKENS, length))

    def long(self, turn: int) -> Text:
        """Another one for every round: no cache of prefixes has seen it."""
        return self._cut(prompt(self.length, seed=turn), self.length)

    def streams(self, count: int) -> list[Text]:
        """Texts that differ from the first word on."""
        return [
            self._cut(f"{i + 2} years later. {STORY}", min(STREAM_TOKENS, self.length)) for i in range(count)
        ]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def _cut(self, text: str, tokens: int) -> Text:
        """Its first tokens, and the text that they are."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
        return Text(self.tokenizer.decode(ids), tuple(ids))
