"""Text files as documents: what quantizers calibrate on, and what models are judged by."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from nybble_models.errors import ModelError

LINES = (".jsonl", ".json")  # an object a line


def read_documents(path: Path) -> list[str]:
    """.jsonl (or .json with an object a line): the "text" of every line; anything else is one document.

    Either may be compressed (.gz). Raises `ModelError` in one line.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf8").replace("\r\n", "\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="give a UTF-8 .txt or .jsonl file") from None
    if not by_line(path):
        return [text]
    rows = enumerate(text.split("\n"), start=1)  # a string may hold other ends of lines, as U+2028
    return [_text_of(line, path, number) for number, line in rows if line.strip()]


def by_line(path: Path) -> bool:
    """Whether each line of the file is a document of its own."""
    return Path(path.name.removesuffix(".gz")).suffix in LINES


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
        text = row["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ModelError(f'{path}:{number} has no "text"', hint='each line is an object: {"text": "..."}')
    return text
