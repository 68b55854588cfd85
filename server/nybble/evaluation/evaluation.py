"""One model on one material, beside a reference where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nybble.config import ServeConfig
from nybble.engine.build import usable_gpu
from nybble.errors import UsageError
from nybble.evaluation import lambada, windows
from nybble.evaluation.intervals import Estimate
from nybble.evaluation.material import Material
from nybble.evaluation.model import Model, Tell
from nybble.evaluation.served import Decoded, Served
from nybble.evaluation.streamed import Streamed
from nybble.evaluation.text import check_vocabulary, tokenizer_of
from nybble_models.hub import fetch

Engine = Literal["serve", "decode", "reference"]

INTERVALS = {"kl_divergence": "kl_interval", "top1_agreement": "top1_interval"}  # where names are shorter


@dataclass(frozen=True, slots=True)
class Result:
    """Every single score, in the order of the windows and passages."""

    scores: Sequence[windows.Score]
    words: Sequence[lambada.Guess]
    reference_words: Sequence[lambada.Guess]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """By name: those of `windows.summarize`; `lambada_...`, `reference_lambada_...` where asked for."""
        found = windows.summarize(self.scores)
        for prefix, words in (("lambada", self.words), ("reference_lambada", self.reference_words)):
            if words:
                found |= {f"{prefix}_{name}": each for name, each in lambada.summarize(words).items()}
        return found

    def figures(self) -> dict[str, object]:
        """Each estimate by name, and its interval of 95 % as a pair, or `None`, beside it."""
        found: dict[str, object] = {}
        for name, each in self.estimates.items():
            found[name] = each.value
            found[INTERVALS.get(name, f"{name}_interval")] = each.ends
        return found


def open_model(engine: Engine, config: ServeConfig, material: Material, tell: Tell) -> Model:
    """`config.model` as it is stored. Raises `UsageError` and the floors' own errors."""
    if engine == "reference":
        return open_streamed(fetch(config.model, config.cache_path), config, "model", tell)
    kind = Served if engine == "serve" else Decoded
    return kind(config, material.longest, tell)


def open_streamed(path: Path, config: ServeConfig, name: str, tell: Tell) -> Streamed:
    """The float32 decoder over the weights of a folder or .gguf file, on a GPU if there is one."""
    on_gpu = config.device != "cpu" and usable_gpu()
    if config.threads:
        torch.set_num_threads(config.threads)
    return Streamed(path, tell, name, torch.device("cuda" if on_gpu else "cpu"))


def check_reference(model: Path, reference: Streamed, material: Material) -> None:
    """Whether the two models speak of the same tokens. Raises `UsageError`."""
    if reference.vocab_size != material.vocabulary:
        raise UsageError(
            f"the model has {material.vocabulary} tokens, its reference {reference.vocab_size}",
            hint="--reference names the model that was quantized",
        )
    theirs = tokenizer_of(reference.path)
    check_vocabulary(tokenizer_of(model), theirs, material.used, reference.path)


def evaluate(model: Model, reference: Model | None, material: Material, tell: Tell) -> Result:
    """Perplexity, and with a reference divergence and agreement; last words where there are passages."""
    scores = list(windows.score(model, reference, material.windows, tell))
    words: Sequence[lambada.Guess] = ()
    reference_words: Sequence[lambada.Guess] = ()
    if material.passages:
        words = list(lambada.guess(model, material.passages, tell, "last words"))
        if reference is not None:
            phase = "last words of the reference"
            reference_words = list(lambada.guess(reference, material.passages, tell, phase))
    return Result(scores, words, reference_words)
