"""LAMBADA: the last word of a passage, which only its whole context tells (Paperno et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.errors import CheckpointError, UsageError
from nybble.evaluation.intervals import Estimate, grow, mean, share
from nybble.evaluation.model import Model, Rows, Tell, Tokens
from nybble.text.tokenizer import Tokenizer
from nybble_models.documents import by_line, read_documents


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of the whole passage; those of its last word start at `first`."""

    tokens: Tokens
    first: int


@dataclass(frozen=True, slots=True)
class Guess:
    """Whether every token of the word is the likeliest one after what is before it, and the word's loss."""

    right: bool
    loss: float


def passages(path: Path, tokenizer: Tokenizer, length: int, count: int) -> list[Passage]:
    """`count` of the n passages of a .jsonl file, every (n // count)th from the first on (0: all).

    Raises `UsageError` and `ModelError`.
    """
    texts = read_documents(path) if by_line(path) else []
    if not texts:
        raise UsageError(f"{path} holds no passages", hint='each line is an object: {"text": "..."}')
    if 0 < count < len(texts):
        texts = texts[:: len(texts) // count][:count]
    return [_passage(text, tokenizer, length) for text in texts]


def _passage(text: str, tokenizer: Tokenizer, length: int) -> Passage:
    """The last word with the space before it, cut where tokens with it and without it part."""
    context = tokenizer.encode(text.rstrip().rpartition(" ")[0]).ids
    tokens = tokenizer.encode(text.rstrip()).ids
    pairs = enumerate(zip(context, tokens, strict=False))
    first = next((index for index, (a, b) in pairs if a != b), min(len(context), len(tokens)))
    over = max(0, len(tokens) - length)  # a passage longer than the model reads loses its beginning
    if first - over < 1:
        raise UsageError(f"a passage has no context: {text[:40]!r}", hint="passages end in the word to guess")
    return Passage(tokens[over:], first - over)


def guess(model: Model, asked: Sequence[Passage], tell: Tell, phase: str) -> Iterator[Guess]:
    """Passage by passage."""
    for index, (passage, rows) in enumerate(zip(asked, model.run([p.tokens for p in asked]), strict=True)):
        yield _guess(passage, rows)
        tell(phase, (index + 1) / len(asked))


@torch.inference_mode()
def _guess(passage: Passage, rows: Rows) -> Guess:
    pieces = list(rows(passage.first - 1, len(passage.tokens) - 1))
    logprobs = torch.cat(pieces).cpu().log_softmax(-1)
    word = torch.tensor(passage.tokens[passage.first :])
    loss = -float(logprobs.gather(1, word[:, None]).sum(dtype=torch.float64))
    if not math.isfinite(loss):
        raise CheckpointError(
            "the logits are not finite", hint="is the model whole? --engine reference tells"
        )
    return Guess(bool((logprobs.argmax(-1) == word).all()), loss)


def summarize(guesses: Sequence[Guess]) -> dict[str, Estimate]:
    """accuracy; perplexity: exp of the mean loss of a word, all its tokens together."""
    right = sum(each.right for each in guesses)
    return {
        "accuracy": share(right, len(guesses)),
        "perplexity": mean([each.loss for each in guesses]).map(grow),
    }
