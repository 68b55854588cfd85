"""The decoder as a plain program over ops: the oracle in tests, the calibration pass, and prefill.

Shapes: T tokens, D hidden, H query heads, G key/value heads, E head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.quantized import look_up
from nybble_models.rotary import rotary_table
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Norm, Weights

Observer = Callable[[str, Tensor], None]
"""`observe(projection, x)` sees the input [T, K] of a linear as the block runs ("q" for q, k and v)."""


class Cache(Protocol):
    """Keys and values of one sequence; `start` positions are held already."""

    start: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Append T positions and attend over all of them: [T, H, E], [T, G, E], [T, G, E] -> [T, H, E]."""
        ...


class ReferenceCache:
    """Keys and values as they come, one growing tensor a layer."""

    def __init__(self, spec: ModelSpec) -> None:
        self.scale = spec.attention_scale
        self.start = 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * spec.num_layers

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        held = self.layers[layer]
        if held is not None:
            key, value = torch.cat((held[0], key)), torch.cat((held[1], value))
        self.layers[layer] = key, value
        return reference.attention(query, key, value, key.shape[0] - query.shape[0], self.scale, window)


class Decoder:
    """Reference decoder: every op in float32, straight from `nybble_kernels.reference`.

    Inputs that a linear wants rounded are rounded. (The CPU's steps round theirs to 8 bits in groups of 32,
    or not at all, whatever a linear wants: that is finer.)
    """

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        if spec.positions == "rotary":
            device = weights.final_norm.weight.device
            self.cos, self.sin = (t.to(device) for t in rotary_table(spec, spec.max_positions))

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """int64 [T] at positions [start, start + T) -> [T, D]."""
        x = look_up(self.weights.embed, tokens)
        if self.weights.positions is not None:
            first = start + self.spec.position_offset
            x = x + self.weights.positions[first : first + len(tokens)].float()
        return x

    def block(self, layer: int, x: Tensor, cache: Cache, observe: Observer | None = None) -> Tensor:
        """One block over T tokens of one sequence: [T, D] -> [T, D]."""
        block = self.weights.blocks[layer]
        normed = self.norm(block.norms["attention_norm"], x)
        x = x + self.attention(block, layer, normed, cache, observe)
        return x + self.mlp(block, self.norm(block.norms["mlp_norm"], x), observe)

    def attention(
        self, block: Block, layer: int, x: Tensor, cache: Cache, observe: Observer | None = None
    ) -> Tensor:
        """Normalised input [T, D] -> what the attention half adds to the stream [T, D]."""
        spec = self.spec
        if observe:
            observe("q", x)
        query, key, value = (
            part.view(x.shape[0], -1, spec.head_dim) for part in self.project(block, ("q", "k", "v"), x)
        )
        if spec.qk_norm:
            query, key = (self.norm(block.norms[n], t) for n, t in (("q_norm", query), ("k_norm", key)))
        if self.cos is not None and self.sin is not None:
            rows = slice(cache.start, cache.start + x.shape[0])
            query, key = (reference.rotary(t, self.cos[rows], self.sin[rows]) for t in (query, key))
        mixed = cache.attend(layer, query, key, value, spec.window(layer)).flatten(1)
        if observe:
            observe("o", mixed)
        return self.project(block, ("o",), mixed)[0]

    def mlp(self, block: Block, x: Tensor, observe: Observer | None = None) -> Tensor:
        """Normalised input [T, D] -> what the feed-forward half adds to the stream [T, D]."""
        first, *rest, _ = self.spec.mlp
        if observe:
            observe(first, x)
        inner, *up = self.project(block, (first, *rest), x)
        inner = reference.activation(inner, self.spec.activation)
        if up:
            inner = inner * up[0]
        if observe:
            observe("down", inner)
        return self.project(block, ("down",), inner)[0]

    def project(self, block: Block, names: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        """The linears of one block that read the same input: [T, K] -> one [T, N] for each name."""
        chosen = [block.linears[name] for name in names]
        rounded = {kind: x if kind is None else kind.round(x) for kind in {each.inputs for each in chosen}}
        return [reference.linear(rounded[each.inputs], each.weight, each.bias) for each in chosen]

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        if self.spec.norm == "rms":
            return reference.rms_norm(x, norm.weight, self.spec.norm_eps)
        return reference.layer_norm(x, norm.weight, norm.bias, self.spec.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: [T, D] -> float32 [T, V]."""
        head = self.weights.head
        x = self.norm(self.weights.final_norm, x)
        return reference.linear(
            x, self.weights.embed if head is None else head.weight, head.bias if head else None
        )

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [T, V] of T tokens that continue `cache` (or start a sequence)."""
        cache = cache or ReferenceCache(self.spec)
        x = self.embed(tokens, cache.start)
        for layer in range(self.spec.num_layers):
            x = self.block(layer, x, cache)
        cache.start += len(tokens)
        return self.logits(x)
