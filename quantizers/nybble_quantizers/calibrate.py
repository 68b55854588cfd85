"""Calibration: windows of tokens, and what the linears of a block read while they run through it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nybble_models.documents import read_documents
from nybble_models.errors import ModelError
from nybble_quantizers import overlap
from nybble_quantizers.hessian import hessian
from nybble_quantizers.workers import Map, in_turn

log = logging.getLogger("nybble.quantize")

SCARCE = 4  # a file with fewer than 1 / SCARCE of the windows asked for is refused


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows without padding, int64 [samples, length], and where they come from.

    `sketch` holds fingerprints of its runs of words (see `overlap`), where it was read and not written.
    """

    tokens: Tensor
    origin: str
    sketch: tuple[str, ...] = ()

    def describe(self) -> dict[str, object]:
        digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        samples, length = self.tokens.shape
        return {
            "origin": self.origin,
            "samples": samples,
            "length": length,
            "sha256": digest,
            "sketch": list(self.sketch),
        }


def read_windows(path: Path, tokenizer: Tokenizer, samples: int, length: int, seed: int) -> Calibration:
    """Pack the documents of a .txt or .jsonl file end to end and draw windows from all over it.

    Raises `ModelError` when the file is unreadable, not text, or too short.
    """
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(read_documents(path)):
        ids += encoding.ids
    found = len(ids) // length
    if found == 0 or found * SCARCE < samples:
        raise ModelError(
            f"{path} holds {len(ids):,} tokens: too short for {samples} windows of {length}",
            hint=f"give at least {max(1, -(-samples // SCARCE)) * length:,} tokens, or ask for fewer samples",
        )
    if found < samples:
        log.warning("%s has %d windows of %d tokens, %d were asked for", path, found, length, samples)
    windows = torch.tensor(ids[: found * length], dtype=torch.int64).view(found, length)
    chosen = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:samples]
    drawn = windows[chosen.sort().values]
    texts = tokenizer.decode_batch(drawn.tolist())
    return Calibration(drawn, path.name, tuple(overlap.sketch(texts)))


def refuse_overlap(calibration: Path, evaluation: Path) -> None:
    """Raises `ModelError` where the text that is to judge the result has ten words in a row of the other."""
    judging = {print for document in read_documents(evaluation) for _, print in overlap.runs(document)}
    found = [run for document in read_documents(calibration) for run in overlap.shared(document, judging)]
    if found:
        raise ModelError(
            f"{calibration.name} and {evaluation.name} share {len(found)} runs of ten words, as {found[0]!r}",
            hint="calibrate on another text, or judge by another",
        )


@dataclass(frozen=True, eq=False)
class Seen:
    """What one linear read of one window: the input [T, K], mean and largest |x| [K]."""

    rows: Tensor
    mean: Tensor
    peak: Tensor


class Observation(dict[str, Seen]):
    """One window's way through a block, by the name under which the decoder shows an input."""

    def observe(self, projection: str, x: Tensor) -> None:
        size = x.abs()
        self[projection] = Seen(x, size.mean(0), size.amax(0))


@dataclass(eq=False)
class Inputs:
    """What the linears of one block read, summed over windows.

    mean, peak: mean and largest |x| of each input channel, [K] · gram: XᵀX over all tokens, [K, K] · tokens:
    how many there were · rows: the inputs themselves of the first `kept` windows, each [T, K].
    """

    kept: int
    mean: dict[str, Tensor] = field(default_factory=dict)
    peak: dict[str, Tensor] = field(default_factory=dict)
    gram: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, *windows: Observation, run: Map = in_turn) -> None:
        for window in windows:
            for projection, seen in window.items():
                self._add(projection, seen)
        for projection in dict.fromkeys(name for window in windows for name in window):
            gram = hessian([window[projection].rows for window in windows], run)
            before = self.gram.get(projection)
            self.gram[projection] = gram if before is None else before.add_(gram)

    def _add(self, projection: str, seen: Seen) -> None:
        before = self.tokens.get(projection, 0)
        total = before + len(seen.rows)
        if before == 0:
            self.mean[projection], self.peak[projection] = seen.mean.clone(), seen.peak.clone()
        else:
            self.mean[projection] += (seen.mean - self.mean[projection]) * (len(seen.rows) / total)
            self.peak[projection] = torch.maximum(self.peak[projection], seen.peak)
        rows = self.rows.setdefault(projection, [])
        if len(rows) < self.kept:
            rows.append(seen.rows)
        self.tokens[projection] = total
