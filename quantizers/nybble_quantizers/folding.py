"""Moving a scale per channel across a linear's input without changing what the block computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm

Pooling = Callable[[Tensor, int], Tensor]


def foldable(spec: ModelSpec, producer: str, consumers: tuple[str, ...]) -> bool:
    """Whether dividing the producer's outputs by a scale divides the consumers' inputs by the same.

    A norm's does; v's does, because attention only averages its rows; up's does when it is multiplied onto
    the gate, or when ReLU follows (positively homogeneous).
    """
    if producer == "up" and not spec.gated:
        return spec.activation == "relu"
    return all(spec.shape(c)[1] % channels(spec, producer) == 0 for c in consumers)


def channels(spec: ModelSpec, producer: str) -> int:
    """How many scales the producer can take: one per output."""
    return spec.shape(producer)[0] if producer in spec.projections else spec.hidden_size


def spread(spec: ModelSpec, producer: str, scale: Tensor) -> Tensor:
    """A scale per producer channel -> a scale per consumer input.

    Under grouped-query attention each v row feeds the same channel of H / G query heads.
    """
    if producer != "v":
        return scale
    shared = spec.num_heads // spec.num_kv_heads
    heads = scale.view(spec.num_kv_heads, 1, spec.head_dim).expand(-1, shared, -1)
    return heads.reshape(-1)


def pool(spec: ModelSpec, producer: str, statistic: Tensor, over: Pooling = torch.mean) -> Tensor:
    """A statistic per consumer input -> one per producer channel (`over` the heads that share it)."""
    if producer != "v":
        return statistic
    return over(statistic.view(spec.num_kv_heads, -1, spec.head_dim), 1).reshape(-1)


def fold(block: Block, spec: ModelSpec, producer: str, consumers: tuple[str, ...], scale: Tensor) -> Block:
    """The same function with the consumers' input columns times `scale` and the producer divided by it."""
    linears, norms = dict(block.linears), dict(block.norms)
    if producer in linears:
        linears[producer] = _divided(linears[producer], scale)
    else:
        norm = norms[producer]
        norms[producer] = Norm(norm.weight / scale, None if norm.bias is None else norm.bias / scale)
    columns = spread(spec, producer, scale)
    for consumer in consumers:
        linears[consumer] = replace(linears[consumer], weight=float_weight(linears[consumer]) * columns)
    return Block(linears, norms)


def _divided(linear: Linear, scale: Tensor) -> Linear:
    bias = None if linear.bias is None else linear.bias / scale
    return Linear(float_weight(linear) / scale[:, None], bias)


def float_weight(linear: Linear) -> Tensor:
    if not isinstance(linear.weight, torch.Tensor):
        raise TypeError("only an unquantized linear can be folded")
    return linear.weight
