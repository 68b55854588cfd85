"""Texts by the ending of their file, and windows without overlap."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest

from nybble.errors import UsageError
from nybble.evaluation import wikitext
from nybble.evaluation.text import check_vocabulary, join_rows, read_text, tokenizer_of, windows
from nybble_models.errors import ModelError
from support_engine import byte_tokenizer

RAW = " \n = Title = \n \n One . \n Two . \n"


def test_rows_are_joined_as_in_the_papers() -> None:
    """Every line is a row with its line end, a blank one an empty row; rows are joined by blank lines."""
    assert join_rows(RAW) == "\n\n = Title = \n\n\n\n\n One . \n\n\n Two . \n"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        pytest.param("a.raw", RAW, join_rows(RAW), id="raw"),
        pytest.param("a.txt", RAW, RAW, id="one document"),
        pytest.param("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', "a\n\nb", id="documents"),
        pytest.param("a.txt", "a\r\nb", "a\nb", id="line ends of Windows"),
    ],
)
def test_a_file_is_read_by_its_ending(tmp_path: Path, name: str, content: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    read = read_text(path)
    assert (read.name, read.text) == (name, text)
    assert read.sha256 == hashlib.sha256(content.encode()).hexdigest()
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    assert read_text(packed).text == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"\xff\xfe", "cannot read", id="not text"),
        pytest.param("a.jsonl", b'{"words": 1}', ":1 has no", id="no text"),
        pytest.param("a.jsonl", b"[1]", ":1 has no", id="no object"),
        pytest.param("a.jsonl", b"{", ":1 has no", id="no JSON"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_text(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_text(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("count", "starts"),
    [(0, [0, 3, 6, 9, 12]), (9, [0, 3, 6, 9, 12]), (2, [0, 6]), (1, [0]), (3, [0, 3, 6])],
)
def test_windows_do_not_overlap_and_drop_the_tail(count: int, starts: list[int]) -> None:
    assert windows(range(17), 3, count) == [(s, s + 1, s + 2) for s in starts]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="2 tokens: too short for one window of 3"):
        windows(range(2), 3, 0)


def test_vocabularies_are_compared_where_they_are_used(tmp_path: Path) -> None:
    ours = tokenizer_of(byte_tokenizer(tmp_path / "ours"))
    folder = byte_tokenizer(tmp_path / "theirs")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 97', '"a": 98', 1).replace('"b": 98', '"b": 97', 1))
    theirs = tokenizer_of(folder)
    check_vocabulary(ours, theirs, {96, 99, 256}, folder)
    with pytest.raises(UsageError, match="token 97 is b'b', not b'a'"):
        check_vocabulary(ours, theirs, {96, 97}, folder)


def archive(path: Path, content: bytes, member: str = wikitext.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(member, content)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that hands out whatever lies at the path."""
    path = tmp_path / "hub.zip"

    def download(repo: str, file: str, repo_type: str, cache_dir: Path, local_files_only: bool) -> str:
        asked = (repo, file, repo_type, cache_dir, local_files_only)
        assert asked == (wikitext.REPOSITORY, wikitext.ARCHIVE, "dataset", tmp_path / "hub", False)
        return str(path)

    monkeypatch.setattr(wikitext, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return path


def test_wikitext_is_fetched_once(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(hub, RAW.encode())
    monkeypatch.setattr(wikitext, "SHA256", hashlib.sha256(RAW.encode()).hexdigest())
    found = wikitext.fetch_wikitext(tmp_path)
    assert read_text(found).text == join_rows(RAW)
    hub.unlink()
    assert wikitext.fetch_wikitext(tmp_path) == found
    assert [each.name for each in found.parent.iterdir()] == [wikitext.NAME]


@pytest.mark.parametrize(
    ("member", "message"), [(wikitext.MEMBER, "holds another"), ("other", "has no wikitext-2-raw")]
)
def test_another_text_is_refused(tmp_path: Path, hub: Path, member: str, message: str) -> None:
    archive(hub, b"something else", member)
    with pytest.raises(UsageError, match=message) as caught:
        wikitext.fetch_wikitext(tmp_path)
    assert "--text FILE" in (caught.value.hint or "")


def test_without_a_hub_the_line_says_how_to_give_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        wikitext.fetch_wikitext(tmp_path)
    assert "--text FILE" in (caught.value.hint or "")
