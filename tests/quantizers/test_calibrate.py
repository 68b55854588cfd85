from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from nybble_models.decoder import Decoder
from nybble_models.errors import ModelError
from nybble_quantizers.calibrate import Inputs, Observation, read_windows
from nybble_quantizers.generate import generate
from support_engine import byte_tokenizer
from support_tiny import CONFIGS, tiny_spec, tiny_weights


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    byte_tokenizer(tmp_path)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_text_is_packed_without_padding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 20)
    found = read_windows(path, tokenizer, samples=4, length=16, seed=0)
    ids = tokenizer.encode(path.read_text()).ids
    whole = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert list(found.tokens.shape) == [4, 16]
    assert all(row in whole for row in found.tokens.tolist())
    assert found.describe()["origin"] == "text.txt"


def test_jsonl_documents_are_joined(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one " * 8, "", "two " * 8)) + "\n\n")
    found = read_windows(path, tokenizer, samples=1, length=40, seed=0)
    assert "two" in tokenizer.decode(found.tokens[0].tolist())


def test_a_seed_decides_which_windows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 26) for i in range(2000)))
    drawn = [read_windows(path, tokenizer, 8, 16, seed).describe()["sha256"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_fewer_windows_than_were_asked_for_are_told(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 20)
    assert len(read_windows(path, tokenizer, 10, 16, 0).tokens) == 10
    assert not caplog.messages
    assert len(read_windows(path, tokenizer, 12, 16, 0).tokens) == 10
    assert caplog.messages == [f"{path} has 10 windows of 16 tokens, 12 were asked for"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("short.txt", b"too short", "too short for 64 windows"),
        ("binary.txt", b"\xff\xfe\x00", "cannot read"),
        ("wrong.jsonl", b'{"text": "fine"}\n{"body": "no"}\n', 'wrong.jsonl:2 has no "text"'),
        ("list.jsonl", b"[1]\n", 'list.jsonl:1 has no "text"'),
        ("broken.jsonl", b"{\n", 'broken.jsonl:1 has no "text"'),
        ("missing.txt", None, "cannot read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_windows(tmp_path / name, tokenizer, samples=64, length=16, seed=0)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_inputs_add_up_over_windows() -> None:
    windows = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (5, 9, 2)]
    seen = Inputs(kept=2)
    for window in windows:
        one = Observation()
        one.observe("q", window)
        seen.add(one)
    together = torch.cat(windows)
    assert torch.allclose(seen.mean["q"], together.abs().mean(0))
    assert torch.allclose(seen.gram["q"], together.T @ together, atol=1e-4)
    assert [len(rows) for rows in seen.rows["q"]] == [5, 9]
    assert seen.tokens["q"] == 16


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_draws_what_the_decoder_finds_likely(name: str) -> None:
    """With a head that is far from flat every token after the first is the reference decoder's own choice."""
    spec = tiny_spec(name)
    weights = tiny_weights(spec, group_size=None)
    weights.final_norm.weight.mul_(1000)
    tokens = generate(spec, weights, samples=5, length=20, seed=7, advance=lambda done: None)
    assert list(tokens.shape) == [5, 20]
    for row in tokens:
        assert torch.equal(Decoder(spec, weights).forward(row)[:-1].argmax(-1), row[1:])


def test_parts_differ_and_do_not_depend_on_each_other() -> None:
    spec = tiny_spec("llama")
    weights = tiny_weights(spec, group_size=None)
    few, many = (generate(spec, weights, n, 12, 0, lambda done: None) for n in (8, 19))
    assert torch.equal(many[:8], few)
    assert not torch.equal(many[8:16], few)
    assert list(many.shape) == [19, 12]


def test_generation_is_seeded() -> None:
    spec = tiny_spec("llama")
    weights = tiny_weights(spec, group_size=None)
    heard: list[int] = []
    drawn = [generate(spec, weights, 4, 12, seed, heard.append) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert heard[:11] == list(range(2, 13))
    assert int(drawn[0].min()) >= 0 and int(drawn[0].max()) < spec.vocab_size
