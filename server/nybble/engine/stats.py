"""The engine in numbers: a snapshot that the HTTP layer turns into metrics. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts fixed once the engine is built: the startup banner, `/v1/models` and info metrics print them."""

    model: str  # name of the checkpoint as given
    directory: str  # checkpoint folder: tokenizer and chat template are read from it
    family: str
    quantization: str  # "awq w4a16 g64 asymmetric" | "none"
    bits: float  # average bits per weight, scales included
    device: str
    kernels: Mapping[str, str]  # what runs: {"decode": "numba avx2", "prefill": "torch float32"}
    dtype: str
    parameters: int
    weight_bytes: Mapping[str, int]  # by kind: linear, embedding, norm
    planned_bytes: Mapping[str, int]  # by kind: weights, kv, workspace
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    bandwidth: float  # bytes per second, read bandwidth measured at start
    load_seconds: Mapping[str, float]  # by phase


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A consistent snapshot. Counters only grow; `live + cached + free == total` blocks."""

    running: int = 0
    waiting: int = 0
    blocks_live: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    blocks_total: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    requests_finished: Mapping[str, int] = field(default_factory=dict)  # by finish reason
    steps: int = 0
    step_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    decode_bytes: int = 0  # exact bytes that the decode steps had to read
    nan_logits: int = 0
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    alive: bool = True  # whether the loop is there to take requests
    heartbeat: float = 0.0  # time.monotonic() of the loop's last turn
