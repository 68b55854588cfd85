"""Prompts on the CPU: as batches of the compiled step, or through PyTorch over floats made of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nybble_kernels import reference
from nybble_models.decoder import Decoder
from nybble_models.paged import ROWS, PagedCache
from nybble_models.rotary import rotary_table
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Weights

PROMPT_ROWS = 64
"""Of a prompt in one call of a compiled step: their activations stay in a cache of the second level."""

Ints = NDArray[np.int32] | Tensor
Floats = NDArray[np.float32] | Tensor

FUSED = {("q", "k", "v"): "qkv", ("gate", "up"): "gate_up"}


class Packed(Protocol):
    """A weight that a step holds packed."""

    def dequantize_into(self, out: Tensor) -> None:
        """Write it as float32 [N, K], partners stacked."""
        ...


class Step(Protocol):
    """One decode step of a whole model, and access to the weights it holds."""

    weight_bytes_per_step: dict[str, int]

    def step(self, tokens: Ints, positions: Ints, tables: Ints, logits: Floats) -> None:
        """int32 [B], int32 [B], int32 [B, blocks] -> float32 [B, V], written in place."""
        ...

    def linear(self, layer: int, name: str) -> Packed:
        """ "qkv", "o", "gate_up" (or "up") or "down" of a layer."""
        ...

    def embedding(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> float32 [T, D]."""
        ...

    def kv_bytes(self, positions: Sequence[int]) -> int:
        """Bytes of keys and values that a step at these positions reads."""
        ...


class Filling(Step, Protocol):
    """A step that can stop once the cache is written."""

    def fill(self, tokens: Ints, positions: Ints, tables: Ints) -> None:
        """`step` without logits."""
        ...


class Prompts(Protocol):
    """Reads prompts into the cache, chunk by chunk: the bits do not depend on how one is cut."""

    workspace_bytes: int

    def fill(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> None:
        """Write keys and values of positions `[start, start + T)`."""
        ...

    def score(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> Tensor:
        """The same, and the logits [T, V] of what follows each."""
        ...


class SteppedPrompts:
    """Positions of a prompt as the rows of a step: each gets what decoding it would give, bit for bit."""

    workspace_bytes = 0

    def __init__(self, spec: ModelSpec, step: Filling) -> None:
        self._vocabulary = spec.vocab_size
        self._step = step

    def fill(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> None:
        for _, batch in self._batches(tokens, start, table):
            self._step.fill(*batch)

    def score(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> Tensor:
        logits = torch.empty(len(tokens), self._vocabulary)
        for rows, batch in self._batches(tokens, start, table):
            self._step.step(*batch, logits[rows])
        return logits

    def _batches(
        self, tokens: Sequence[int], start: int, table: Sequence[int]
    ) -> Iterator[tuple[slice, tuple[Ints, Ints, Ints]]]:
        """Rows, tokens, positions and tables of one call after another."""
        array, blocks = np.array(tokens, np.int32), np.array(table, np.int32)
        positions = np.arange(start, start + len(array), dtype=np.int32)
        for first in range(0, len(array), PROMPT_ROWS):
            rows = slice(first, first + PROMPT_ROWS)
            tables = np.tile(blocks, (len(array[rows]), 1))
            yield rows, (array[rows], positions[rows], tables)


class FloatPrompts(Decoder):
    """The decoder whose projections are of floats, dequantized on the way.

    Rows are padded to tiles of 16: below 8 rows a BLAS may sum in another order, and then a prompt's numbers
    would depend on how it was cut into chunks.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, step: Step, kv: Tensor, dtype: torch.dtype) -> None:
        super().__init__(spec, weights)
        self.steps = step
        self.kv = kv
        self.dtype = dtype
        self.layer_of = {id(block): layer for layer, block in enumerate(weights.blocks)}
        self.biases = {
            id(b): {names: _stacked_bias(b, names) for names in self._stacks()} for b in weights.blocks
        }
        largest = max(outputs * inputs for outputs, inputs in map(self._shape, self._stacks()))
        self.workspace = torch.empty(largest)
        self.workspace_bytes = self.workspace.nbytes
        if spec.positions == "rotary":
            self.cos, self.sin = rotary_table(spec, spec.max_positions + ROWS)

    def _stacks(self) -> list[tuple[str, ...]]:
        first = ("gate", "up") if self.spec.gated else ("up",)
        return [("q", "k", "v"), ("o",), first, ("down",)]

    def _shape(self, names: Sequence[str]) -> tuple[int, int]:
        """(outputs, inputs) of projections stacked."""
        return sum(self.spec.shape(n)[0] for n in names), self.spec.shape(names[0])[1]

    def fill(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> None:
        self.run(tokens, start, table)

    def score(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> Tensor:
        return self._predict(self.run(tokens, start, table))

    def run(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> Tensor:
        """Fill the cache with positions `[start, start + T)`; hidden states [T, D] before the final norm."""
        count = len(tokens)
        x = self.embed(torch.tensor(tokens, dtype=torch.int64), start)
        x = F.pad(x, (0, 0, 0, -count % ROWS))
        cache = PagedCache(self.spec, self.kv, table, start, count)
        for layer in range(self.spec.num_layers):
            x = self.block(layer, x, cache)
        return x[:count]

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.steps.embedding(tokens)
        if self.weights.positions is not None:
            first = start + self.spec.position_offset
            x = x + self.weights.positions[first : first + len(tokens)].float()
        return x

    def project(self, block: Block, names: Sequence[str], x: Tensor) -> Sequence[Tensor]:
        key = tuple(names)
        packed = self.steps.linear(self.layer_of[id(block)], FUSED.get(key, key[0]))
        y = self._dequantized(key, packed, x)
        bias = self.biases[id(block)][key]
        if bias is not None:
            y += bias
        return torch.split(y, [self.spec.shape(n)[0] for n in key], dim=-1)

    def _dequantized(self, key: Sequence[str], packed: Packed, x: Tensor) -> Tensor:
        outputs, inputs = self._shape(key)
        weight = self.workspace[: outputs * inputs].view(outputs, inputs)
        packed.dequantize_into(weight)
        return F.linear(x.to(self.dtype), weight.to(self.dtype)).float()

    def _predict(self, x: Tensor) -> Tensor:
        """Final norm and head over [T, D], rows padded like those of a prompt."""
        count, head = x.shape[0], self.weights.head
        x = F.pad(self.norm(self.weights.final_norm, x), (0, 0, 0, -count % ROWS))
        if head is not None:
            return reference.linear(x, head.weight, head.bias)[:count]
        return F.linear(x, self.steps.embedding(torch.arange(self.spec.vocab_size)))[:count]


def _stacked_bias(block: Block, names: Sequence[str]) -> Tensor | None:
    biases = [block.linears[n].bias for n in names]
    if all(b is None for b in biases):
        return None
    return torch.cat([b.float() for b in biases if b is not None])
