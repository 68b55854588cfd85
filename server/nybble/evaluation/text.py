"""The text a model is measured on, and its windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.errors import UsageError
from nybble.evaluation.model import Tokens
from nybble.text.tokenizer import Tokenizer
from nybble_models.documents import read_documents
from nybble_models.formats import gguf_tokenizer
from nybble_models.formats.gguf_header import read_header

LONGEST = 2048  # tokens of a window in the papers


@dataclass(frozen=True, slots=True)
class Text:
    """A file's text as one string; `sha256` is of the file."""

    name: str
    sha256: str
    text: str

    def describe(self) -> Mapping[str, str]:
        return {"name": self.name, "sha256": self.sha256}


def read_text(path: Path) -> Text:
    """.raw: the rows of WikiText; .jsonl: the documents, a blank line between; else one document.

    Any of them as .gz too. Raises `ModelError` in one line.
    """
    text = "\n\n".join(read_documents(path))
    if path.name.removesuffix(".gz").endswith(".raw"):
        text = join_rows(text)
    return Text(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), text)


def join_rows(text: str) -> str:
    """The rows of the raw WikiText split as the papers join them: blank lines are empty rows."""
    rows = text.split("\n")[:-1]
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def windows(ids: Sequence[int], length: int, count: int) -> list[Tokens]:
    """Windows without overlap, the tail dropped: `count` of the n, every (n // count)th from the first on.

    All of them where `count` is 0. Where it does not divide n, the end of the text is left out.
    """
    starts = range(0, len(ids) - length + 1, length)
    if not starts:
        raise UsageError(
            f"the text has {len(ids):,} tokens: too short for one window of {length:,}",
            hint="give a longer text, or a smaller --length",
        )
    if 0 < count < len(starts):
        starts = starts[:: len(starts) // count][:count]
    return [tuple(ids[start : start + length]) for start in starts]


def tokenizer_of(model: Path) -> Tokenizer:
    """Of a folder or of a GGUF file. Raises `CheckpointError` where there is none."""
    if model.is_dir():
        return Tokenizer.load(model)
    return Tokenizer(gguf_tokenizer.build(read_header(model).metadata), {})


def check_vocabulary(ours: Tokenizer, theirs: Tokenizer, used: set[int], reference: Path) -> None:
    """Every token that is used must be the same piece of text in both models."""
    for token in sorted(used):
        mine, other = ours.token_bytes(token), theirs.token_bytes(token)
        if mine != other:
            raise UsageError(
                f"{reference} has another vocabulary: token {token} is {other!r}, not {mine!r}",
                hint="--reference names the model that was quantized",
            )
