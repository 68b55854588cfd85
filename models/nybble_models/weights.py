"""A model's tensors, arranged as the spec says: what the loader returns and everything else reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.quantized import QuantizedTensor, Table, Weight, shape_of, stacked


@dataclass(slots=True)
class Linear:
    """y = Q(x) Wᵀ + b; weight [N, K] of any kind, bias [N] or None; `inputs` is Q, None leaves x as it is."""

    weight: Weight
    bias: Tensor | None = None
    inputs: Activations | None = None


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

    def hollow(self) -> Block:
        """The same without the weights of the linears, of which only shapes are left."""
        linears = {
            name: replace(linear, weight=torch.empty(shape_of(linear.weight), device="meta"))
            for name, linear in self.linears.items()
        }
        return Block(linears, self.norms)


@dataclass(slots=True)
class Weights:
    """The whole model. `head` is None when the embedding serves as the head."""

    embed: Table  # [V, D]
    positions: Tensor | None  # [P + offset, D]
    blocks: list[Block]
    final_norm: Norm
    head: Linear | None

    def tensors(self) -> Iterator[tuple[str, Weight]]:
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
    """Stack linears that read the same input into one, or leave them apart where their kinds differ.

    Static scales of inputs are part of the kind: what was calibrated apart is multiplied apart.
    """
    weight = stacked([p.weight for p in parts])
    if weight is None or any(p.inputs != parts[0].inputs for p in parts):
        return parts
    bias = None
    if any(p.bias is not None for p in parts):
        bias = torch.cat([_bias_or_zeros(p) for p in parts])
    return [Linear(weight, bias, parts[0].inputs)]


def order_inner(linears: dict[str, Linear], mlp: Sequence[str]) -> None:
    """Make the inner values in the order that `down` reads them: its act-order then costs nothing.

    `mlp`: the projections of the feed-forward half, `down` last (`ModelSpec.mlp`).
    """
    down = linears["down"].weight
    if not isinstance(down, QuantizedTensor) or down.permutation is None:
        return
    for name in mlp[:-1]:
        linears[name] = select(linears[name], down.permutation)
    linears["down"] = replace(linears["down"], weight=replace(down, permutation=None))


def select(linear: Linear, outputs: Tensor) -> Linear:
    """These outputs, in this order (int64 [M])."""
    outputs = outputs.to(linear.weight.device)
    weight = linear.weight[outputs] if isinstance(linear.weight, Tensor) else linear.weight.select(outputs)
    return replace(linear, weight=weight, bias=None if linear.bias is None else linear.bias[outputs])


def _bias_or_zeros(linear: Linear) -> Tensor:
    return linear.bias if linear.bias is not None else torch.zeros(shape_of(linear.weight)[0])
