"""A decode step on PyTorch's ops: the portable path, for processors and formats no kernel of ours takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nybble_kernels import torch_cpu
from nybble_kernels.quantized import Weight, dense, look_up
from nybble_kernels.torch_cpu import PackedLinear
from nybble_models.decoder import Decoder
from nybble_models.paged import PagedCache, kv_reader
from nybble_models.prefill import FUSED, Floats, Ints, Packed
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Weights, fuse

Packer = Callable[[Weight], PackedLinear]


class Stack:
    """Projections that read one input: fused where their kinds allow, side by side where not."""

    def __init__(self, block: Block, names: Sequence[str], pack: Packer) -> None:
        parts = fuse([block.linears[n] for n in names])
        self.linears = [pack(p.weight) for p in parts]
        self.biases = [None if p.bias is None else p.bias.float() for p in parts]
        self.rows = [p.weight.shape[0] for p in parts]
        self.nbytes = sum(linear.nbytes for linear in self.linears)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [y(x) if b is None else y(x) + b for y, b in zip(self.linears, self.biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def dequantize_into(self, out: Tensor) -> None:
        for linear, rows in zip(self.linears, torch.split(out, self.rows), strict=True):
            linear.dequantize_into(rows)


class BatchCache:
    """One new token of each of B sequences; attention runs sequence by sequence, as it would alone."""

    def __init__(self, spec: ModelSpec, kv: Tensor, positions: Sequence[int], tables: Tensor) -> None:
        self.start = 0
        self.sequences = [
            PagedCache(spec, kv, table.tolist(), position, 1, tile=1)
            for position, table in zip(positions, tables, strict=True)
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        rows = [
            cache.attend(layer, query[b : b + 1], key[b : b + 1], value[b : b + 1], window)
            for b, cache in enumerate(self.sequences)
        ]
        return torch.cat(rows)


class TorchStep(Decoder):
    """Packs a model for PyTorch's CPU ops. `head`: the output matrix, of the kind it is to be kept in."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, kv: Tensor, head: Weight, pack: Packer = torch_cpu.pack
    ) -> None:
        super().__init__(spec, weights)
        self.kv = kv
        first = ("gate", "up") if spec.gated else ("up",)
        stacks = (("q", "k", "v"), ("o",), first, ("down",))
        self.packed = [
            {FUSED.get(n, n[0]): Stack(block, n, pack) for n in stacks} for block in weights.blocks
        ]
        self.layer_of = {id(block): layer for layer, block in enumerate(weights.blocks)}
        self.head = pack(head)
        self.table = self.cos, self.sin
        self.weight_bytes_per_step = {
            "linear": sum(stack.nbytes for layer in self.packed for stack in layer.values()),
            "head": self.head.nbytes,
            "norm": sum(n.weight.nbytes for b in weights.blocks for n in b.norms.values()),
        }

    @classmethod
    def reference(cls, spec: ModelSpec, weights: Weights, kv: Tensor, head: Weight) -> TorchStep:
        """The same step with every weight dequantized to float32: slow, and obviously right."""
        return cls(spec, weights, kv, head, lambda weight: torch_cpu.FloatLinear(dense(weight)))

    @torch.inference_mode()
    def step(self, tokens: Ints, positions: Ints, tables: Ints, logits: Floats) -> None:
        places = torch.as_tensor(positions).long()
        x = self.embedding(torch.as_tensor(tokens).long())
        if self.weights.positions is not None:
            x = x + self.weights.positions[places + self.spec.position_offset].float()
        cos, sin = self.table
        if cos is not None and sin is not None:
            self.cos, self.sin = cos[places], sin[places]
        cache = BatchCache(self.spec, self.kv, places.tolist(), torch.as_tensor(tables))
        for layer in range(self.spec.num_layers):
            x = self.block(layer, x, cache)
        torch.as_tensor(logits).copy_(self.head(self.norm(self.weights.final_norm, x)))

    def project(self, block: Block, names: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        key = tuple(names)
        y = self.packed[self.layer_of[id(block)]][FUSED.get(key, key[0])](x)
        return torch.split(y, [self.spec.shape(n)[0] for n in key], dim=-1)

    def linear(self, layer: int, name: str) -> Packed:
        return self.packed[layer][name]

    def embedding(self, tokens: Tensor) -> Tensor:
        return look_up(self.weights.embed, tokens)

    def kv_bytes(self, positions: Sequence[int]) -> int:
        return sum(map(kv_reader(self.spec), positions))
