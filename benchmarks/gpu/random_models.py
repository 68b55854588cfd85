"""Models of random weights, made on the device a layer at a time: every figure is real but what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import paths  # noqa: F401
import torch
from shapes import MODELS, TINY
from subject import random_codes, rows8
from torch import Tensor

from nybble_kernels.activations import Activations
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm, Weights

KINDS = ("W4A16", "W8A8", "fp16")
BLOCK_SIZE = 16


def random_weight(outputs: int, inputs: int, kind: str, device: str) -> Weight:
    """4-bit codes in groups of 128, 8-bit codes with a scale a row, or float16 values."""
    if kind == "W4A16":
        group = 128 if inputs % 128 == 0 else 64
        return random_codes(outputs, inputs, device, group=group)
    dense = torch.randn(outputs, inputs, device=device).mul_(inputs**-0.5)
    if kind == "fp16":
        return dense.half()
    codes, scales = rows8(dense)
    return QuantizedTensor((codes.short() + 128).to(torch.uint8), scales, 8, inputs)


def random_norm(size: int, layer: bool, device: str) -> Norm:
    weight = torch.rand(size, device=device) + 0.5
    return Norm(weight, torch.randn(size, device=device) * 0.1 if layer else None)


def random_block(spec: ModelSpec, kind: str, device: str) -> Block:
    layer = spec.norm == "layer"

    def linear(projection: str) -> Linear:
        outputs, inputs = spec.shape(projection)
        bias = torch.randn(outputs, device=device) * 0.1 if spec.has_bias(projection) else None
        rounded = Activations() if kind == "W8A8" else None
        return Linear(random_weight(outputs, inputs, kind, device), bias, rounded)

    linears = {projection: linear(projection) for projection in spec.projections}
    norms = {name: random_norm(spec.hidden_size, layer, device) for name in ("attention_norm", "mlp_norm")}
    return Block(linears, norms)


def random_weights(spec: ModelSpec, device: str) -> Weights:
    """Everything but the blocks, in float16."""
    shape = (spec.vocab_size, spec.hidden_size)
    positions = None
    if spec.positions == "learned":
        positions = torch.randn(spec.max_positions + spec.position_offset, spec.hidden_size, device=device)
    head = None if spec.tied_head else Linear((torch.randn(shape, device=device) * shape[1] ** -0.5).half())
    embed = torch.randn(shape, device=device).half()
    return Weights(embed, positions, [], random_norm(spec.hidden_size, spec.norm == "layer", device), head)


def repeated(block: Block, layers: int) -> Iterator[Block]:
    """The same numbers for every layer: each is packed into memory of its own."""
    for _ in range(layers):
        linears = {
            name: replace(linear, weight=_own(linear.weight)) for name, linear in block.linears.items()
        }
        yield Block(linears, block.norms)


def _own(weight: Weight) -> Weight:
    """Packing copies codes; values may be kept where they lie, so those are copied here."""
    return weight.clone() if isinstance(weight, Tensor) else weight


def build(spec: ModelSpec, kind: str, device: str, *, context: int, chunk: int, pdl: bool) -> Any:
    """A `TritonStep` of random weights with room for `context` positions and some more."""
    from nybble_kernels.triton.tiles import Tuning
    from nybble_models.triton_memory import Cache, Sizes
    from nybble_models.triton_step import Settings, TritonStep

    blocks = -(-(context + 64) // BLOCK_SIZE)
    spec = replace(spec, max_positions=max(spec.max_positions, blocks * BLOCK_SIZE))
    where = torch.device(device)
    settings = Settings(
        where,
        torch.float16 if kind == "fp16" else torch.bfloat16,
        Tuning.of_device(where) if device == "cuda" else Tuning(processors=2),
        pdl=pdl,
    )

    def cache() -> Cache:
        made = Cache.allocate(spec, blocks + 1, BLOCK_SIZE, settings.dtype, where)
        made.kv.normal_()  # zeros would cost less power than numbers do
        return made

    weights = random_weights(spec, device)
    head = weights.embed if weights.head is None else weights.head.weight
    layers = repeated(random_block(spec, kind, device), spec.num_layers)
    return TritonStep(spec, weights, layers, cache, head, settings, Sizes(1, chunk, blocks))


class Model:
    """One model on the device, standing at a context. `step` is what a graph captures."""

    def __init__(self, name: str, kind: str, device: str, context: int, chunk: int) -> None:
        from nybble_kernels.triton.sample_state import SampleState
        from nybble_kernels.triton.sample_state import Settings as Draw

        spec = TINY if name == "tiny" else MODELS[name]
        self.name, self.kind = name, kind
        self.made = build(spec, kind, device, context=context, chunk=chunk, pdl=False)
        scratch = self.made.scratch
        blocks = scratch.tables.shape[1]
        scratch.tables[0] = torch.randperm(blocks, device=device).int() + 1
        self.draws = SampleState(1, spec.vocab_size, 1, torch.device(device))
        self.draws.open(0, Draw(temperature=0.0))
        self.drawn = torch.zeros(1, 1, dtype=torch.int32, device=device)

    def at(self, context: int, pdl: bool) -> None:
        """The next step puts the token that was drawn last at position `context`."""
        self.made.settings = replace(self.made.settings, pdl=pdl)
        inputs = self.made.scratch.inputs
        inputs.zero_()
        inputs[0], inputs[1, 0] = -1, context

    def step(self) -> None:
        from nybble_kernels.triton.sample import sample

        scratch, pdl = self.made.scratch, self.made.settings.pdl
        self.made.decode(1, self.draws.tokens)
        sample(scratch.logits[:1], scratch.slots[:1], self.draws, self.drawn, scratch.place, pdl=pdl)

    def check(self) -> None:
        """Raises unless a step makes numbers. Which ones, the tests of the step have checked."""
        self.step()
        if not bool(self.made.scratch.logits[:1].isfinite().all()):
            raise ArithmeticError("logits are not finite")

    def prompt(self, tokens: int) -> None:
        """A prompt's first chunk. Its logits are not made: serving needs none of them."""
        self.made.prefill(tokens, 0, self.made.scratch.tables[0])

    def begin_prompt(self, tokens: int) -> None:
        scratch = self.made.scratch
        scratch.tokens[:tokens] = torch.arange(tokens, device=scratch.tokens.device)
        scratch.positions[:tokens] = torch.arange(tokens, device=scratch.tokens.device)

    def bytes_at(self, context: int) -> int:
        return int(sum(self.made.weight_bytes.values()) + self.made.kv_bytes([context]))
