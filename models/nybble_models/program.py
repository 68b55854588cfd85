"""A model as a program of the compiled CPU step: the one reader of the spec that turns it into ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from nybble_kernels.numba.arena import Arena
from nybble_kernels.numba.builder import LOGITS, Attention, Buffer, ProgramBuilder
from nybble_kernels.numba.compiled import compiled_step, kernels
from nybble_kernels.numba.isa import choose
from nybble_kernels.numba.program import DecodeProgram, Limits, Written
from nybble_kernels.numba.weight import HeldWeight, hold, packed_bound
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_models.paged import kv_reader
from nybble_models.prefill import PROMPT_ROWS
from nybble_models.rotary import rotary_table
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Norm, Weights, fuse

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
) -> DecodeProgram:
    """Pack the model and compile its decode step (some seconds on the first start, then from disk).

    blocks: those that `weights` lacks, packed as they come: without their weights they are added to it. They
    take about `reserve` bytes.
    kv: bfloat16 [layers, blocks, 2, block_size, kv_heads, head_dim], zeros at first · head: makes the output
    matrix in the form it is to be kept. It is packed before any block is read, and let go of. Where the model
    ties it to the embedding and it is quantized, the embedding is read from it too.
    """
    chosen = choose(isa)
    with ThreadPoolExecutor(1, "compile") as aside:  # while the kernels compile as their formats are met
        run = aside.submit(compiled_step, progress)
        made = head()
        threads = max(1, threads)
        arena = Arena(_reserve(weights, made, threads) + reserve, threads)
        held = hold(made, arena)
        del made
        rows = max(max_batch, PROMPT_ROWS)
        writer = _Writer(spec, weights, ProgramBuilder(kernels(chosen, progress), arena, rows), kv)
        written = writer.write(held, weights.blocks if blocks is None else _hollowed(blocks, weights))
        limits = Limits(spec.vocab_size, spec.max_positions, kv_reader(spec))
        step = run.result()
    return DecodeProgram(writer.builder, step, kv, written, spec.hidden_size, limits)


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
        self.linears: dict[tuple[int, str], Sequence[HeldWeight]] = {}
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

    def write(self, head: HeldWeight, blocks: Iterable[Block]) -> Written:
        """The whole step."""
        builder, spec = self.builder, self.spec
        for layer, block in enumerate(blocks):
            self._attention(layer, block)
            self._mlp(layer, block)
        self._norm(self.x, self.normed, self.weights.final_norm)
        bias = None if self.weights.head is None else self.weights.head.bias
        builder.linear(self.normed, LOGITS, head, bias, kind="head")
        embedding = self._table(head)
        ops, builder.ops = builder.ops, []
        builder.embed(self.x, embedding, self.weights.positions, spec.position_offset)
        builder.ops += ops
        return Written(self.linears, embedding, len(builder.ops) - len(ops) + self.filling)

    def _table(self, head: HeldWeight) -> Tensor | HeldWeight:
        """The embedding: the packed head that is tied to it, levels of its own, or floats as stored."""
        stored = self.weights.embed
        if self.weights.head is None and head.integer:
            return head
        return stored if isinstance(stored, Tensor) else hold(stored, self.builder.arena)

    def _attention(self, layer: int, block: Block) -> None:
        builder, spec = self.builder, self.spec
        self._norm(self.x, self.normed, block.norms["attention_norm"])
        self._stack(layer, "qkv", block, ("q", "k", "v"), self.normed, self.qkv)
        norms = [block.norms[n].weight if spec.qk_norm else None for n in ("q_norm", "k_norm")]
        builder.place(self.qkv, self.shape, layer, norms[0], norms[1], spec.norm_eps)
        self.filling = len(builder.ops)
        builder.attend(self.qkv, self.mixed, self.shape, layer, spec.window(layer), self.length, self.page)
        self._stack(layer, "o", block, ("o",), self.mixed, self.x, residual=True)

    def _mlp(self, layer: int, block: Block) -> None:
        spec = self.spec
        self._norm(self.x, self.normed, block.norms["mlp_norm"])
        names = ("gate", "up") if spec.gated else ("up",)
        self._stack(layer, "_".join(names), block, names, self.normed, self.first)
        self.builder.activate(self.first, self.inner, spec.activation, spec.gated)
        self._stack(layer, "down", block, ("down",), self.inner, self.x, residual=True)

    def _norm(self, x: Buffer, y: Buffer, norm: Norm) -> None:
        self.builder.norm(x, y, norm.weight, norm.bias, self.spec.norm_eps, self.spec.norm == "layer")

    def _stack(
        self,
        layer: int,
        name: str,
        block: Block,
        names: Sequence[str],
        x: Buffer,
        y: Buffer,
        residual: bool = False,
    ) -> None:
        """Projections that read one input: fused where their kinds allow, else side by side."""
        held: list[HeldWeight] = []
        column = 0
        for part in fuse([block.linears[n] for n in names]):
            weight = self.builder.linear(x, y, part.weight, part.bias, column=column, residual=residual)
            held.append(weight)
            column += weight.outputs
        self.linears[layer, name] = held
