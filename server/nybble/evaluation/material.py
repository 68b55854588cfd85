"""What a model is measured on: windows of a text, and passages whose last word is to be guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.errors import UsageError
from nybble.evaluation.lambada import Passage, passages
from nybble.evaluation.model import Tokens
from nybble.evaluation.text import LONGEST, Text, read_text, tokenizer_of, windows
from nybble_models.hub import open_source
from nybble_models.loader import Loader


@dataclass(frozen=True, slots=True)
class Choice:
    """What to take: so many `windows` and `passages`, 0 for all; `length` None for the papers'."""

    text: Path
    windows: int = 12
    length: int | None = None
    lambada: Path | None = None
    passages: int = 500


@dataclass(frozen=True, slots=True)
class Material:
    """`tokens` in the whole text, of which `windows` are measured; `vocabulary`: tokens the model knows."""

    text: Text
    tokens: int
    vocabulary: int
    length: int
    windows: Sequence[Tokens]
    passages: Sequence[Passage]
    lambada: Text | None

    @property
    def longest(self) -> int:
        return max([self.length, *(len(each.tokens) for each in self.passages)])

    @property
    def used(self) -> set[int]:
        """The ids that occur."""
        texts = (*self.windows, *(each.tokens for each in self.passages))
        return {token for tokens in texts for token in tokens}

    def describe(self) -> Mapping[str, object]:
        text = {
            **self.text.describe(),
            "tokens": self.tokens,
            "length": self.length,
            "windows": len(self.windows),
            "windows_in_text": self.tokens // self.length,
        }
        if self.lambada is None:
            return {"text": text}
        return {"text": text, "lambada": {**self.lambada.describe(), "passages": len(self.passages)}}


def gather(model: Path, choice: Choice) -> Material:
    """Read and tokenize, in one call each. Raises `UsageError` and `CheckpointError`."""
    spec = Loader(open_source(model)).spec
    length = min(LONGEST, spec.max_positions) if choice.length is None else choice.length
    if not 2 <= length <= spec.max_positions:
        raise UsageError(
            f"length: {length} tokens; the model reads 2 to {spec.max_positions}",
            hint="lower --length, or leave it out",
        )
    text, tokenizer = read_text(choice.text), tokenizer_of(model)
    ids = tokenizer.encode(text.text).ids
    file, asked = None, []
    if choice.lambada is not None:
        file = read_text(choice.lambada)
        asked = passages(choice.lambada, tokenizer, spec.max_positions, choice.passages)
    chosen = windows(ids, length, choice.windows)
    made = Material(text, len(ids), spec.vocab_size, length, chosen, asked, file)
    if max(made.used) >= spec.vocab_size:
        raise UsageError(
            f"{model}: the tokenizer knows token {max(made.used)}, the model {spec.vocab_size} tokens",
            hint="is the tokenizer of another model?",
        )
    return made
