"""A runner whose "keys and values" are the tokens themselves: its logits are a hash of what the block table
holds, so that a block lost, shared wrongly or overwritten changes the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.engine.engine import Engine
from nybble.engine.request import Delta, Request, SamplingParams
from nybble.engine.runner import Table
from nybble.engine.stats import EngineInfo

VOCABULARY = 64
EOS = 63


class TokenRunner:
    """`fail_on`: a token whose presence in a batch raises. `delay`: seconds a step takes."""

    def __init__(
        self,
        blocks: int,
        block_size: int,
        *,
        fail_on: int | None = None,
        nan_on: int | None = None,
        delay: float = 0,
    ) -> None:
        self.kv = np.full((blocks, block_size), -1, dtype=np.int64)
        self.block_size = block_size
        self.fail_on = fail_on
        self.nan_on = nan_on
        self.delay = delay
        self.batches: list[int] = []
        self.prefilled = 0

    def prefill(self, tokens: Sequence[int], start: int, table: Table) -> None:
        for position, token in enumerate(tokens, start):
            self._write(position, token, table)
        self.prefilled += len(tokens)

    def score(self, tokens: Sequence[int], start: int, table: Table) -> NDArray[np.float32]:
        self.prefill(tokens, start, table)
        return np.stack([self._logits(start + i, table) for i in range(len(tokens))])

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Table]
    ) -> NDArray[np.float32]:
        if self.fail_on is not None and self.fail_on in tokens:
            raise RuntimeError("planted failure")
        time.sleep(self.delay)
        self.batches.append(len(tokens))
        rows = []
        for token, position, table in zip(tokens, positions, tables, strict=True):
            self._write(position, token, table)
            rows.append(self._logits(position, table))
            if token == self.nan_on:
                rows[-1][:] = np.nan
        return np.stack(rows)

    def decode_bytes(self, positions: Sequence[int]) -> int:
        return 1000 + sum(positions)

    def used_bytes(self) -> Mapping[str, int]:
        return {"kv": self.kv.nbytes}

    def _write(self, position: int, token: int, table: Table) -> None:
        self.kv[table[position // self.block_size], position % self.block_size] = token

    def _logits(self, position: int, table: Table) -> NDArray[np.float32]:
        blocks = table[: position // self.block_size + 1]
        held = self.kv[list(blocks)].reshape(-1)[: position + 1]
        assert (held >= 0).all(), "a position was read that nobody wrote"
        seed = int.from_bytes(blake2b(held.tobytes(), digest_size=8).digest(), "little")
        return np.random.Generator(np.random.Philox(seed)).normal(size=VOCABULARY).astype(np.float32)


def info(blocks: int = 64, block_size: int = 4, max_model_len: int = 128) -> EngineInfo:
    return EngineInfo(
        model="tokens", directory="", family="llama", quantization="none", bits=16, device="cpu", kernels={},
        dtype="float32", parameters=1, weight_bytes={}, planned_bytes={}, max_model_len=max_model_len,
        vocab_size=VOCABULARY, eos_token_ids=(EOS,), block_size=block_size, num_blocks=blocks,
        kv_bytes_per_token=1, bandwidth=1e9, load_seconds={},
    )  # fmt: skip


def make_engine(
    blocks: int = 64,
    block_size: int = 4,
    *,
    kind: type[TokenRunner] = TokenRunner,
    runner: TokenRunner | None = None,
    **options: Any,
) -> Engine:
    runner = runner or kind(blocks, block_size)
    return Engine(info(blocks, block_size), runner, **options)


class Collector:
    """A sink that keeps every delta and knows when the last one came."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.done = threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [d.token for d in self.deltas if d.token is not None]

    @property
    def finish(self) -> str | None:
        return self.deltas[-1].finish if self.deltas else None

    def wait(self, seconds: float = 20) -> Collector:
        assert self.done.wait(seconds), f"no finish within {seconds} s"
        return self


def request(name: str, prompt: Sequence[int], max_tokens: int = 8, **params: Any) -> Request:
    settings = {"temperature": 0.0, "ignore_eos": True} | params
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **settings))


def solo(prompt: Sequence[int], max_tokens: int = 8, **params: Any) -> list[int]:
    """The answer of an engine that has nothing else to do."""
    engine = make_engine()
    engine.start()
    try:
        sink = Collector()
        engine.submit(request("solo", prompt, max_tokens, **params), sink)
        return sink.wait().tokens
    finally:
        engine.stop()
