"""Tiny random models of every family, built from a config alone, with or without quantized linears."""

from __future__ import annotations

import math
from typing import Any

import torch

from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.families import FAMILIES, spec_of
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm, Weights

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
_LLAMA = _COMMON | {"intermediate_size": 96, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"tie_word_embeddings": True},
    "mistral": _LLAMA | {"sliding_window": 7, "head_dim": 32},
    "qwen2": _LLAMA | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": _LLAMA | {"head_dim": 32},
    "opt": _COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


def tiny_spec(family: str, **changes: Any) -> ModelSpec:
    row = next(f for f in FAMILIES if f.name == family)
    return spec_of(CONFIGS[family] | {"architectures": list(row.architectures)} | changes)


def round_to_nearest(weight: torch.Tensor, group_size: int = 32, bits: int = 4) -> QuantizedTensor:
    """Asymmetric min-max levels: enough to have codes to compute with."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp_min(1e-6).half().float()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (groups / scales.unsqueeze(-1)).round().add(zeros.unsqueeze(-1)).clamp(0, 2**bits - 1)
    return QuantizedTensor(
        codes.flatten(1).to(torch.uint8), scales, bits, group_size, zeros=zeros.to(torch.uint8)
    )


def tiny_weights(spec: ModelSpec, *, seed: int = 0, group_size: int | None = 32) -> Weights:
    """Random weights; `group_size=None` leaves the linears in float32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale + shift

    def linear(projection: str) -> Linear:
        outputs, inputs = spec.shape(projection)
        weight: Weight = random(outputs, inputs, scale=1.5 / math.sqrt(inputs))
        if group_size is not None:
            weight = round_to_nearest(weight, group_size)
        return Linear(weight, random(outputs, scale=0.3) if spec.has_bias(projection) else None)

    def norm(size: int) -> Norm:
        return Norm(
            random(size, scale=0.2, shift=1.0), random(size, scale=0.2) if spec.norm == "layer" else None
        )

    def block() -> Block:
        norms = {"attention_norm": norm(spec.hidden_size), "mlp_norm": norm(spec.hidden_size)}
        if spec.qk_norm:
            norms |= {"q_norm": norm(spec.head_dim), "k_norm": norm(spec.head_dim)}
        return Block({p: linear(p) for p in spec.projections}, norms)

    learned = spec.positions == "learned"
    return Weights(
        embed=random(spec.vocab_size, spec.hidden_size),
        positions=random(spec.max_positions + spec.position_offset, spec.hidden_size, scale=0.3)
        if learned
        else None,
        blocks=[block() for _ in range(spec.num_layers)],
        final_norm=norm(spec.hidden_size),
        head=None if spec.tied_head else Linear(random(spec.vocab_size, spec.hidden_size)),
    )
