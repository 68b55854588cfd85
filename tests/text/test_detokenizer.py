"""Pieces of text add up to the whole, and none cuts a character."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nybble.errors import CheckpointError, InvalidRequest
from nybble.text.detokenizer import Detokenizer
from nybble.text.tokenizer import Tokenizer
from support_engine import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer(tmp_path_factory.mktemp("tiny")))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(text=st.text())
def test_text_comes_back_character_by_character(tokenizer: Tokenizer, text: str) -> None:
    ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text
    assert [piece for piece in found if piece] == list(text)


@given(ids=st.lists(st.integers(0, 259)))
def test_any_ids_decode_as_the_library_decodes_them(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Broken bytes and special tokens included."""
    expected = tokenizer._core.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(tokenizer, ids)) == expected


def test_cut_character_is_flushed(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, list("é".encode())[:1]) == ["", "\ufffd"]


def test_offsets_are_characters(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode("aé👍b")
    assert encoded.ids[0] == 256
    assert encoded.offsets == (0, 0, 1, 1, 2, 2, 2, 2, 3)


def test_lone_surrogate_is_an_invalid_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest):
        tokenizer.encode("a\ud800")


def sentencepiece_like() -> Tokenizer:
    """Spaces as ▁, unknown bytes as <0x..>, the way Llama 2 and Gemma spell them."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁wor", "ld", "▁"]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_tokens([AddedToken("<tag>", special=False)])
    return Tokenizer(core, {})


def test_sentencepiece_vocabulary_is_spelled_in_bytes() -> None:
    tokenizer = sentencepiece_like()
    ids = [257, 258, 259, 260, *(1 + byte for byte in "👍".encode()), 261]
    found = pieces(tokenizer, ids)
    assert "".join(found) == " Hello world 👍<tag>" == tokenizer.decode(ids)
    assert found[4:8] == ["", "", "", "👍"]


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    """A model's output may be padded wider than its tokenizer."""
    assert pieces(tokenizer, [97, 300, 98]) == ["a", "", "b", ""]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "<html>", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object, found list"),
        ("chat_template.jinja", "{% if %}", "chat template"),
    ],
)
def test_broken_folder_is_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    file = byte_tokenizer(tmp_path) / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=says):
        Tokenizer.load(tmp_path)
