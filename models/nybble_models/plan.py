"""Bytes of everything, from the spec alone, before anything is loaded."""

from __future__ import annotations

import math
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


def weight_bytes(spec: ModelSpec, linears: Quantization, head_bits: int, apart: bool = False) -> int:
    """Linears as quantized, the head at `head_bits`, an embedding of its own at 16 bits, unless it is tied
    and not kept `apart`."""
    blocks = spec.num_layers * sum(linears.nbytes(*spec.shape(p)) for p in spec.projections)
    head = Quantization(head_bits).nbytes(spec.vocab_size, spec.hidden_size)
    shared = spec.tied_head and head_bits < 16 and not apart
    embedding = 0 if shared else Quantization().nbytes(spec.vocab_size, spec.hidden_size)
    return blocks + head + embedding


def plan(
    spec: ModelSpec,
    linears: Quantization,
    *,
    head_bits: int = 8,
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
    weights = weight_bytes(spec, linears, head_bits, apart)
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
