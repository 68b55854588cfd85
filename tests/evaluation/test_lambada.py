"""Last words: where they are cut, and what counts as right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nybble.errors import UsageError
from nybble.evaluation.lambada import Passage, guess, passages, summarize
from nybble.text.tokenizer import Tokenizer
from support_engine import byte_tokenizer
from support_scripted import ScriptedModel


def quiet(phase: str, fraction: float) -> None:
    pass


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer(tmp_path / "tokenizer"))


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
    return path


def test_the_word_starts_with_the_space_before_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (passage,) = passages(write(tmp_path / "l.jsonl", "the cat sat\n"), tokenizer, 100, 0)
    assert bytes(passage.tokens[1 : passage.first]) == b"the cat"
    assert bytes(passage.tokens[passage.first :]) == b" sat"
    assert passage.tokens[0] == 256  # BOS


def test_a_passage_that_is_too_long_loses_its_beginning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (passage,) = passages(write(tmp_path / "l.jsonl", "the cat sat"), tokenizer, 7, 0)
    assert bytes(passage.tokens) == b"cat sat"
    assert passage.first == 3


def test_some_of_many_are_evenly_spaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "l.jsonl", *(f"a {letter}" for letter in "bcdefg"))
    taken = [chr(each.tokens[-1]) for each in passages(path, tokenizer, 100, 3)]
    assert taken == ["b", "d", "f"]


@pytest.mark.parametrize("text", ["word", "a longer-word"], ids=["one word", "no room"])
def test_a_word_without_context_is_refused(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match="no context"):
        passages(write(tmp_path / "l.jsonl", text), _bare(tokenizer, tmp_path), 12, 0)


def _bare(tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    """The same without BOS, so that one word is all there is."""
    path = tmp_path / "tokenizer" / "tokenizer.json"
    core = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(core))
    return Tokenizer.load(path.parent)


def test_a_file_without_passages_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no passages"):
        passages(write(tmp_path / "l.jsonl"), tokenizer, 100, 0)
    (tmp_path / "l.txt").write_text("the cat sat")
    with pytest.raises(UsageError, match="no passages"):
        passages(tmp_path / "l.txt", tokenizer, 100, 0)


def test_right_is_every_token_of_the_word() -> None:
    """After 0 comes 1, after 1 comes 2, after 2 comes 0, each with probability 1/2; others share the rest."""
    probabilities = torch.full((4, 4), 1 / 6)
    for token, following in ((0, 1), (1, 2), (2, 0), (3, 3)):
        probabilities[token, following] = 0.5
    asked = [
        Passage((3, 0, 1, 2), 2),  # both right
        Passage((3, 0, 1, 1), 2),  # the second wrong
        Passage((2, 0), 1),
    ]
    guesses = list(guess(ScriptedModel(probabilities.log()), asked, quiet, "words"))
    assert [each.right for each in guesses] == [True, False, True]
    assert [each.loss for each in guesses] == pytest.approx(
        [2 * math.log(2), math.log(2) + math.log(6), math.log(2)], rel=1e-5
    )
    found = summarize(guesses)
    assert found["accuracy"].value == 2 / 3
    mean = (4 * math.log(2) + math.log(6)) / 3
    assert found["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-5)
