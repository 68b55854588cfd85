"""A model as a program of the compiled CPU step: the one reader of the spec that turns it into ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from nybble_kernels.numba.arena import Arena
from nybble_kernels.numba.builder import LOGITS, Attention, Buffer, ProgramBuilder
from nybble_kernels.numba.compiled import compiled_step, kernels
from nybble_kernels.numba.isa import choose
from nybble_kernels.numba.program import DecodeProgram, Limits, Written
from nybble_kernels.numba.weight import HeldWeight, hold, packed_bound
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.packed import PackedLayer, PackedModel, PackedPart
from nybble_models.paged import kv_reader
from nybble_models.prefill import PROMPT_ROWS
from nybble_models.rotary import rotary_table
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm, Weights, fuse

Progress = Callable[[str], None]


def build_program(
    spec: ModelSpec,
    weights: Weights,
    kv: Tensor,
    *,
    head: Callable[[], Weight],
    threads: int,
    max_batch: int,
    isa: str | None = None,
    progress: Progress | None = None,
    blocks: Iterable[Block] | None = None,
    reserve: int = 0,
    packed: PackedModel | None = None,
    keep: Callable[[PackedModel], None] | None = None,
) -> DecodeProgram:
    """Pack the model and compile its decode step (some seconds on the first start, then from disk).

    blocks: those that `weights` lacks, packed as they come: without their weights they are added to it. They
    take about `reserve` bytes.
    kv: bfloat16 [layers, blocks, 2, block_size, kv_heads, head_dim], zeros at first · head: makes the output
    matrix in the form it is to be kept. It is packed before any block is read, and let go of. Where the model
    ties it to the embedding and it is quantized, the embedding is read from it too.
    packed: what an earlier start packed, instead of `head` and `blocks` · keep: takes what this one packed.
    """
    chosen = choose(isa)
    with ThreadPoolExecutor(1, "compile") as aside:  # while the kernels compile as their formats are met
        run = aside.submit(compiled_step, progress)
        fresh = packed is None
        if packed is None:
            packed = _with_head(head(), weights, max(1, threads), reserve)
            layers = _layers(spec, weights.blocks if blocks is None else _hollowed(blocks, weights))
        else:
            layers = iter(packed.layers)
        rows = max(max_batch, PROMPT_ROWS)
        writer = _Writer(spec, weights, ProgramBuilder(kernels(chosen, progress), packed.arena, rows), kv)
        written = writer.write(packed, layers)
        limits = Limits(spec.vocab_size, spec.max_positions, kv_reader(spec))
        step = run.result()
    if fresh and keep is not None:
        keep(writer.packed(packed, written))
    return DecodeProgram(writer.builder, step, kv, written, spec.hidden_size, limits)


def _with_head(head: Weight, weights: Weights, threads: int, reserve: int) -> PackedModel:
    """An arena for a whole model, the head packed first."""
    arena = Arena(_reserve(weights, head, threads) + reserve, threads)
    return PackedModel(arena, hold(head, arena), [])


class _Layer(Protocol):
    """A block to be written: as loaded, or packed before."""

    @property
    def norms(self) -> Mapping[str, Norm]: ...

    def parts(self, stack: str) -> Sequence[Linear | PackedPart]:
        """Partners that read one input, stacked where their kinds allow, else side by side."""
        ...


@dataclass(frozen=True)
class _Loaded:
    """Partners are stacked when their turn comes: stacks take memory."""

    block: Block
    stacks: Mapping[str, Sequence[str]]

    @property
    def norms(self) -> Mapping[str, Norm]:
        return self.block.norms

    def parts(self, stack: str) -> Sequence[Linear]:
        return fuse([self.block.linears[name] for name in self.stacks[stack]])


def _layers(spec: ModelSpec, blocks: Iterable[Block]) -> Iterator[_Layer]:
    inner = ("gate", "up") if spec.gated else ("up",)
    stacks = {"qkv": ("q", "k", "v"), "o": ("o",), "_".join(inner): inner, "down": ("down",)}
    for block in blocks:
        yield _Loaded(block, stacks)


def _hollowed(blocks: Iterable[Block], weights: Weights) -> Iterator[Block]:
    """Each block whole while it is written."""
    for block in blocks:
        yield block
        weights.blocks.append(block.hollow())


def _reserve(weights: Weights, head: Weight, threads: int) -> int:
    linears = [linear.weight for block in weights.blocks for linear in block.linears.values()]
    apart = weights.head is not None and isinstance(weights.embed, QuantizedTensor)
    tables = [head, weights.embed] if apart else [head]
    return sum(packed_bound(weight, threads) for weight in [*linears, *tables])


class _Writer:
    """Buffers of the stream, and the ops of one layer after another."""

    def __init__(self, spec: ModelSpec, weights: Weights, builder: ProgramBuilder, kv: Tensor) -> None:
        self.spec, self.weights, self.builder = spec, weights, builder
        self.page = kv.shape[3]
        self.length = min(spec.max_positions, kv.shape[1] * kv.shape[3])
        self.layers: list[PackedLayer] = []
        self.filling = 0
        cos, sin = rotary_table(spec, spec.max_positions) if spec.positions == "rotary" else (None, None)
        self.shape = Attention(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.attention_scale,
            *(None if t is None else t.contiguous() for t in (cos, sin)),
        )
        query = spec.num_heads * spec.head_dim
        self.x, self.normed = builder.buffer(spec.hidden_size), builder.buffer(spec.hidden_size)
        self.qkv = builder.buffer(query + 2 * spec.num_kv_heads * spec.head_dim)
        self.mixed = builder.buffer(query)
        self.first = builder.buffer(spec.intermediate_size * (2 if spec.gated else 1))
        self.inner = builder.buffer(spec.intermediate_size)

    def write(self, model: PackedModel, layers: Iterable[_Layer]) -> Written:
        """The whole step."""
        builder, spec = self.builder, self.spec
        for number, layer in enumerate(layers):
            stacks = self._attention(number, layer) | self._mlp(layer)
            self.layers.append(PackedLayer(dict(layer.norms), stacks))
        self._norm(self.x, self.normed, self.weights.final_norm)
        bias = None if self.weights.head is None else self.weights.head.bias
        builder.linear(self.normed, LOGITS, model.head, bias, kind="head")
        embedding = self._table(model)
        ops, builder.ops = builder.ops, []
        builder.embed(self.x, embedding, self.weights.positions, spec.position_offset)
        builder.ops += ops
        linears = {
            (number, stack): [part.weight for part in parts]
            for number, layer in enumerate(self.layers)
            for stack, parts in layer.stacks.items()
        }
        return Written(linears, embedding, len(builder.ops) - len(ops) + self.filling)

    def packed(self, model: PackedModel, written: Written) -> PackedModel:
        """All that was packed."""
        table = written.embedding
        held = None if isinstance(table, Tensor) or table is model.head else table
        return replace(model, layers=self.layers, embedding=held)

    def _table(self, model: PackedModel) -> Tensor | HeldWeight:
        """The embedding: the packed head that is tied to it, levels of its own, or floats as stored."""
        stored = self.weights.embed
        if self.weights.head is None and model.head.integer:
            return model.head
        if model.embedding is not None:
            return model.embedding
        return stored if isinstance(stored, Tensor) else hold(stored, self.builder.arena)

    def _attention(self, number: int, layer: _Layer) -> dict[str, list[PackedPart]]:
        builder, spec, shape = self.builder, self.spec, self.shape
        self._norm(self.x, self.normed, layer.norms["attention_norm"])
        qkv = self._stack(layer, "qkv", self.normed, self.qkv)
        norms = [layer.norms[n].weight if spec.qk_norm else None for n in ("q_norm", "k_norm")]
        builder.place(self.qkv, shape, number, norms[0], norms[1], spec.norm_eps)
        self.filling = len(builder.ops)
        builder.attend(self.qkv, self.mixed, shape, number, spec.window(number), self.length, self.page)
        return qkv | self._stack(layer, "o", self.mixed, self.x, residual=True)

    def _mlp(self, layer: _Layer) -> dict[str, list[PackedPart]]:
        spec = self.spec
        self._norm(self.x, self.normed, layer.norms["mlp_norm"])
        first = self._stack(layer, "gate_up" if spec.gated else "up", self.normed, self.first)
        self.builder.activate(self.first, self.inner, spec.activation, spec.gated)
        return first | self._stack(layer, "down", self.inner, self.x, residual=True)

    def _norm(self, x: Buffer, y: Buffer, norm: Norm) -> None:
        self.builder.norm(x, y, norm.weight, norm.bias, self.spec.norm_eps, self.spec.norm == "layer")

    def _stack(
        self, layer: _Layer, stack: str, x: Buffer, y: Buffer, residual: bool = False
    ) -> dict[str, list[PackedPart]]:
        held: list[PackedPart] = []
        column = 0
        for part in layer.parts(stack):
            weight = self.builder.linear(x, y, part.weight, part.bias, column=column, residual=residual)
            held.append(PackedPart(weight, part.bias))
            column += weight.outputs
        return {stack: held}
