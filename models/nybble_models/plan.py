"""Bytes of everything, from the spec alone, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nybble_models.paged import bytes_per_token
from nybble_models.spec import ModelSpec

AUTO_CONTEXTS = 4  # full-length sequences that an automatic cache is made for ...
AUTO_BYTES = 2 * 1024**3  # ... as long as it stays below this


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the planner needs to know of a scheme: bits of a code, and bits of scale and zero per group."""

    bits: int = 16
    group_size: int = 0  # 0: no groups
    group_bits: int = 0

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = outputs * math.ceil(inputs / self.group_size) if self.group_size else 0
        return (outputs * inputs * self.bits + groups * self.group_bits) // 8


FLOATS = Quantization()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Planned bytes, and the tokens the cache holds."""

    weights: int
    kv: int
    workspace: int
    kv_tokens: int
    max_model_len: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace


Linears = Quantization | Callable[[int, str], Quantization]
"""One for all, or one for each layer and projection."""


def weight_bytes(
    spec: ModelSpec,
    linears: Linears,
    head: Quantization,
    apart: bool = False,
    embedding: Quantization = FLOATS,
) -> int:
    """Linears and head as quantized, and the embedding, unless it is tied and not kept `apart`."""

    def of(layer: int, projection: str) -> int:
        chosen = linears if isinstance(linears, Quantization) else linears(layer, projection)
        return chosen.nbytes(*spec.shape(projection))

    blocks = sum(of(layer, p) for layer in range(spec.num_layers) for p in spec.projections)
    shared = spec.tied_head and head.bits < 16 and not apart
    tables = [head] if shared else [head, embedding]
    return blocks + sum(table.nbytes(spec.vocab_size, spec.hidden_size) for table in tables)


def plan(
    spec: ModelSpec,
    linears: Linears,
    *,
    head: Quantization = Quantization(8),  # frozen
    embedding: Quantization = FLOATS,
    max_model_len: int = 0,
    kv_tokens: int = 0,
    block_size: int = 16,
    max_batch_tokens: int = 512,
    memory: int | None = None,
    kv_bits: int = 16,
    contexts: int = AUTO_CONTEXTS,
    cache_bytes: int = AUTO_BYTES,
    apart: bool = False,
) -> MemoryPlan:
    """Zero means automatic. `memory`: bytes that may be used; the cache shrinks to fit, never below one
    full-length sequence. An automatic cache holds `contexts` full-length sequences, or `cache_bytes`.
    Raises `MemoryError` when that is too much."""
    length = min(max_model_len or spec.max_positions, spec.max_positions)
    per_token = bytes_per_token(spec, kv_bits)
    weights = weight_bytes(spec, linears, head, apart, embedding)
    largest = max(math.prod(spec.shape(p)) for p in spec.projections)
    workspace = 4 * (3 * largest + max_batch_tokens * (4 * spec.hidden_size + 3 * spec.intermediate_size))
    tokens = kv_tokens or max(length, min(contexts * length, cache_bytes // per_token))
    if memory is not None and not kv_tokens:
        tokens = min(tokens, (memory - weights - workspace) // per_token)
    if not max_model_len:
        length = min(length, tokens)
    if memory is not None and weights + workspace + tokens * per_token > memory and kv_tokens:
        raise MemoryError(
            f"{weights + workspace + tokens * per_token:,} bytes are needed for {tokens} tokens"
        )
    if tokens < min(length, block_size) or tokens < max_model_len:
        raise MemoryError(
            f"{weights + workspace + length * per_token:,} bytes are needed for a sequence of {length} tokens"
        )
    tokens -= tokens % block_size
    return MemoryPlan(weights, tokens * per_token, workspace, tokens, min(length, tokens))
