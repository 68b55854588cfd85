from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nybble_models.errors import ModelError
from nybble_quantizers import corpus

ROWS = "\n".join(json.dumps({"text": text}) for text in ("one", "two")) + "\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_lines_are_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(ROWS.encode()) if name.endswith(".gz") else ROWS.encode())
    assert corpus.read_documents(path) == ["one", "two"]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    texts = ["a\u2028b\u2029c", "d\x85e"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join([*rows, ""]).encode())
    assert corpus.read_documents(tmp_path / "a.jsonl") == texts


def test_any_other_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert corpus.read_documents(tmp_path / "a.txt.gz") == ["one\n\ntwo"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"not gzip"], ids=["not utf-8", "not gzip"])
def test_what_is_not_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("a.txt" if content[0] == 0xFF else "a.gz")
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot read") as caught:
        corpus.read_documents(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf:owner", "hf:owner/data", "hf:owner/data/", "hf:"])
def test_a_data_set_is_named_with_a_file(name: str) -> None:
    with pytest.raises(ModelError, match="does not name a file"):
        corpus.locate(name)


def test_a_file_of_a_data_set_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(tmp_path / "found.jsonl")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert corpus.locate("hf:owner/data/en/part-0.jsonl") == tmp_path / "found.jsonl"
    assert asked == [("owner/data", "en/part-0.jsonl", "dataset")]


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"owner/data-set-of-nobody is not in the cache") as caught:
        corpus.locate("hf:owner/data-set-of-nobody/a.jsonl")
    assert "writes the text itself" in caught.value.hint
