"""A model's tensors, arranged as the spec says: what the loader returns and everything else reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, Weight, cat, compatible, shape_of


@dataclass(slots=True)
class Linear:
    """y = x Wᵀ + b; weight [N, K] of either kind, bias [N] or None."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(slots=True)
class Norm:
    """weight and, for LayerNorm, bias: [D] each (q_norm and k_norm: [head_dim])."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class Block:
    """One decoder block: linears by projection ("q" ... "down"), norms by role ("attention_norm" ...)."""

    linears: dict[str, Linear] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)


@dataclass(slots=True)
class Weights:
    """The whole model. `head` is None when the embedding serves as the head."""

    embed: Tensor  # [V, D]
    positions: Tensor | None  # [P + offset, D]
    blocks: list[Block]
    final_norm: Norm
    head: Linear | None

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Every stored weight with its kind: "embedding", "head", "linear" or "norm"."""
        yield "embedding", self.embed
        if self.positions is not None:
            yield "embedding", self.positions
        if self.head is not None:
            yield "head", self.head.weight
        for norm in [self.final_norm, *(n for b in self.blocks for n in b.norms.values())]:
            yield "norm", norm.weight
        for linear in (x for b in self.blocks for x in b.linears.values()):
            yield "linear", linear.weight
            if linear.bias is not None:
                yield "linear", linear.bias

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind, quantized weights at their packed size."""
        total: dict[str, int] = {}
        for kind, tensor in self.tensors():
            total[kind] = total.get(kind, 0) + tensor.nbytes
        return total


def fuse(parts: list[Linear]) -> list[Linear]:
    """Stack linears that read the same input into one, or leave them apart where their kinds differ."""
    weights = [p.weight for p in parts]
    biases = [p.bias for p in parts]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([_bias_or_zeros(p) for p in parts])
    if all(isinstance(w, Tensor) for w in weights):
        return [Linear(torch.cat([w for w in weights if isinstance(w, Tensor)]), bias)]
    quantized = [w for w in weights if isinstance(w, QuantizedTensor)]
    if len(quantized) == len(weights) and all(compatible(quantized[0], w) for w in quantized):
        return [Linear(cat(quantized), bias)]
    return parts


def _bias_or_zeros(linear: Linear) -> Tensor:
    return linear.bias if linear.bias is not None else torch.zeros(shape_of(linear.weight)[0])
