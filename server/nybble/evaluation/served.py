"""A model as it is served: the runner that the engine drives, with its kernels, its cache and its head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.config import ServeConfig
from nybble.engine.build import build_runner
from nybble.evaluation.model import CHUNK, Rows, Tell, Tokens


class Served:
    """Texts go the way of prompts: chunks through the paged cache, then the head as it is kept."""

    engine = "serve"
    whole = CHUNK  # rows are computed from a multiple of this: a cut chunk would cost as much as two

    def __init__(self, config: ServeConfig, length: int, tell: Tell) -> None:
        """`length`: of the longest text. What is not quantized stays so. Raises as `build_engine` does."""
        block = config.block_size
        alone = replace(
            config,
            quantization="none",
            packed_cache=False,  # a checkpoint that is judged is often gone afterwards
            max_model_len=length,
            kv_cache_tokens=-(-length // block) * block,
            max_num_seqs=1,
            max_num_batched_tokens=CHUNK,
        )
        self._model = config.model
        self._info, self._runner = build_runner(alone, tell)
        self.vocab_size = self._info.vocab_size

    def run(self, texts: Sequence[Tokens]) -> Iterator[Rows]:
        for tokens in texts:
            blocks = -(-len(tokens) // self._info.block_size)
            yield partial(self._rows, tokens, list(range(blocks)))

    def _rows(self, tokens: Tokens, table: list[int], first: int, stop: int) -> Iterator[Tensor]:
        known = first // self.whole * self.whole
        for start in range(0, known, CHUNK):
            self._runner.prefill(tokens[start : min(start + CHUNK, known)], start, table)
        for start in range(known, stop, CHUNK):
            chunk = tokens[start : min(start + CHUNK, stop)]
            logits = torch.from_numpy(self._logits(chunk, start, table))
            yield logits[max(0, first - start) :]

    def _logits(self, chunk: Tokens, start: int, table: list[int]) -> NDArray[np.float32]:
        return self._runner.score(chunk, start, table)

    def describe(self) -> Mapping[str, object]:
        info = self._info
        return {
            "path": self._model,
            "engine": self.engine,
            "quantization": info.quantization,
            "bits": round(info.bits, 3),
            "device": info.device,
            "kernels": dict(info.kernels),
            "dtype": info.dtype,
        }


class Decoded(Served):
    """Texts go the way of answers: a decode step for every token whose logits are asked for."""

    engine = "decode"
    whole = 1

    def _logits(self, chunk: Tokens, start: int, table: list[int]) -> NDArray[np.float32]:
        steps = (self._runner.decode([token], [start + i], [table]) for i, token in enumerate(chunk))
        return np.concatenate([logits.copy() for logits in steps])
