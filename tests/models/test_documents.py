"""Text files as documents: one for the whole file, or one a line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nybble_models.documents import read_documents
from nybble_models.errors import ModelError

ROWS = "\n".join(json.dumps({"text": text}) for text in ("one", "two")) + "\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_lines_are_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(ROWS.encode()) if name.endswith(".gz") else ROWS.encode())
    assert read_documents(path) == ["one", "two"]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    texts = ["a\u2028b\u2029c", "d\x85e"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join([*rows, ""]).encode())
    assert read_documents(tmp_path / "a.jsonl") == texts


def test_any_other_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert read_documents(tmp_path / "a.txt.gz") == ["one\n\ntwo"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"not gzip"], ids=["not utf-8", "not gzip"])
def test_what_is_not_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("a.txt" if content[0] == 0xFF else "a.gz")
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot read") as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


def test_line_ends_of_windows_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\r\n")
    assert read_documents(tmp_path / "a.txt") == ["a\nb\n"]


@pytest.mark.parametrize("line", ['{"words": 1}', '{"text": 1}', "[1]", "1", "{"])
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(ROWS + "\n" + line)
    with pytest.raises(ModelError, match=r'a\.jsonl:4 has no "text"'):
        read_documents(tmp_path / "a.jsonl")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_documents(tmp_path / "nothing.txt")
