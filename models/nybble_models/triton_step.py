"""A model on the GPU: packed weights, buffers, and the launches that take tokens to logits.

About five launches a layer: qkv · attention (norms, rotary, cache, softmax) · o, with the residual and the
next norm's operand · gate and up, with the activation · down, with the residual. A prompt's chunk runs the
same products with two launches for attention. Nothing is allocated on the way and nothing waits for the host,
so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor, Table, Weight
from nybble_kernels.triton.activation import activation
from nybble_kernels.triton.attention_decode import attention_decode
from nybble_kernels.triton.attention_prefill import attention_prefill
from nybble_kernels.triton.embed import embed
from nybble_kernels.triton.epilogue import Activate, Operand, Residual, Store
from nybble_kernels.triton.linear import DeviceLinear, FoldedNorm, make_linear
from nybble_kernels.triton.quantize import QuantizedOperand, quantize, quantize_operand
from nybble_kernels.triton.rotary import rotary
from nybble_kernels.triton.tiles import Phase, Tuning
from nybble_models.rotary import rotary_table
from nybble_models.spec import ModelSpec
from nybble_models.triton_memory import Cache, Scratch, Sizes
from nybble_models.weights import Block, Linear, Norm, Weights, fuse, order_inner, select


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder block as launched. `qkv` and `first` hold one linear, or several where kinds differ."""

    qkv: Sequence[DeviceLinear]
    o: DeviceLinear
    first: Sequence[DeviceLinear]
    down: DeviceLinear
    mlp_norm: Tensor
    following_norm: Tensor  # of the next layer's attention, or the final one
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None

    def linears(self) -> Iterable[DeviceLinear]:
        return *self.qkv, self.o, *self.first, self.down


@dataclass(frozen=True, eq=False)
class Settings:
    """What a step is built for. `pdl`: launches start while the one before still runs (sm_90 and later)."""

    device: torch.device
    dtype: torch.dtype
    tuning: Tuning
    pdl: bool = False


class TritonStep:
    """Launches over fixed buffers: `decode` and `prefill` read `scratch.tokens`, `.positions`, `.tables`.

    `blocks` are taken one at a time and packed on the device, so that the model is never held twice.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        blocks: Iterable[Block],
        make_cache: Callable[[], Cache],
        head: Weight,
        settings: Settings,
        sizes: Sizes,
    ) -> None:
        self.spec, self.settings = spec, settings
        norms: list[Norm] = []
        packed = [self._pack(layer, block, norms) for layer, block in enumerate(blocks)]
        norms.append(self._norm_on_device(weights.final_norm))
        following = [norm.weight for norm in norms[1:]]
        self.layers = [replace(p, following_norm=n) for p, n in zip(packed, following, strict=True)]
        self.first_norm = norms[0].weight
        bias = None if weights.head is None else weights.head.bias
        self.head = self._linear([Linear(head, bias)], norms[-1])[0]
        self.table = self._table(weights.embed)
        self.positions = None if weights.positions is None else weights.positions.to(settings.device)
        self.cos, self.sin = self._angles()
        self.scratch = Scratch(spec, [*self.linears()], settings, sizes)
        self.cache = make_cache()  # last: packing needs room, and the cache may take all that is left

    def _table(self, embed: Table) -> Table:
        """The embedding on the device; levels with real minimums as float32, which holds them exactly."""
        if isinstance(embed, QuantizedTensor) and embed.minimums is not None:
            embed = embed.dequantize()
        return embed.to(self.settings.device)

    def _angles(self) -> tuple[Tensor | None, Tensor | None]:
        if self.spec.positions != "rotary":
            return None, None
        cos, sin = rotary_table(self.spec, self.spec.max_positions)
        return cos.contiguous().to(self.settings.device), sin.contiguous().to(self.settings.device)

    def linears(self) -> Iterable[DeviceLinear]:
        """All products of a step, in their order."""
        for layer in self.layers:
            yield from layer.linears()
        yield self.head

    def _pack(self, layer: int, block: Block, norms: list[Norm]) -> Layer:
        """Appends the norm that this layer's attention reads through."""
        spec = self.spec
        attention, mlp = (self._norm_on_device(block.norms[n]) for n in ("attention_norm", "mlp_norm"))
        norms.append(attention)
        parts = {name: self._on_device(linear) for name, linear in block.linears.items()}
        order_inner(parts, spec.mlp)
        first = fuse([parts[n] for n in spec.mlp[:-1]])
        if spec.gated and len(first) == 1:
            first = [_interleave(first[0])]
        heads = [
            block.norms[n].weight.float().to(self.settings.device)
            for n in ("q_norm", "k_norm")
            if spec.qk_norm
        ]
        return Layer(
            qkv=self._linear(fuse([parts[n] for n in "qkv"]), attention),
            o=self._linear([parts["o"]])[0],
            first=self._linear(first, mlp),
            down=self._linear([parts["down"]])[0],
            mlp_norm=mlp.weight,
            following_norm=mlp.weight,
            q_norm=heads[0] if heads else None,
            k_norm=heads[1] if heads else None,
            window=spec.window(layer),
        )

    def _norm_on_device(self, norm: Norm) -> Norm:
        device = self.settings.device
        return Norm(
            norm.weight.float().to(device), None if norm.bias is None else norm.bias.float().to(device)
        )

    def _on_device(self, linear: Linear) -> Linear:
        device = self.settings.device
        bias = None if linear.bias is None else linear.bias.to(device)
        return replace(linear, weight=linear.weight.to(device), bias=bias)

    def _linear(self, parts: Sequence[Linear], norm: Norm | None = None) -> list[DeviceLinear]:
        """Packed, with a LayerNorm's mean and bias folded in."""
        s = self.settings
        folded = FoldedNorm(norm.weight, norm.bias) if norm and self.spec.norm == "layer" else None
        return [
            make_linear(
                part.weight.to(s.device),
                part.bias,
                dtype=s.dtype,
                tuning=s.tuning,
                norm=folded,
                inputs=part.inputs,
            )
            for part in parts
        ]

    def decode(self, rows: int, last: Tensor | None = None) -> None:
        """One token of each of `rows` sequences; logits in `scratch.logits`.

        A negative token stands for `last[slot]`. Rows whose position is negative are idle.
        """
        scratch, cache, spec = self.scratch, self.cache, self.spec

        def attend(layer: int, held: Layer) -> None:
            attention_decode(
                scratch.qkv[:rows],
                cache.kv[layer],
                None if cache.scales is None else cache.scales[layer],
                scratch.positions[:rows],
                scratch.tables[:rows],
                self.cos,
                self.sin,
                held.q_norm,
                held.k_norm,
                eps=spec.norm_eps,
                scale=spec.attention_scale,
                window=held.window,
                softcap=None,
                splits=scratch.splits,
                out=scratch.mixed.values[:rows],
                workspace=scratch.attention,
                counters=scratch.attention_counters,
                pdl=self.settings.pdl,
            )

        stream = self._blocks(rows, "decode", attend, last)
        self._head(stream, rows, "decode")

    def prefill(self, rows: int, start: int, table: Tensor) -> Operand:
        """Positions `[start, start + rows)` of one sequence; the operand from which `_head` makes logits."""
        scratch, cache, spec = self.scratch, self.cache, self.spec

        def attend(layer: int, held: Layer) -> None:
            scales = None if cache.scales is None else cache.scales[layer]
            rotary(
                scratch.qkv[:rows],
                cache.kv[layer],
                scales,
                table,
                self.cos,
                self.sin,
                held.q_norm,
                held.k_norm,
                start=start,
                count=rows,
                eps=spec.norm_eps,
                out=scratch.query[:rows],
                pdl=self.settings.pdl,
            )
            attention_prefill(
                scratch.query[:rows],
                cache.kv[layer],
                scales,
                table,
                start=start,
                count=rows,
                scale=spec.attention_scale,
                window=held.window,
                softcap=None,
                out=scratch.mixed.values[:rows],
                pdl=self.settings.pdl,
            )

        return self._blocks(rows, "prefill", attend)

    def score(self, stream: Operand, rows: int) -> Iterable[Tensor]:
        """float32 logits of the rows of a prompt's chunk, some rows at a time; each valid until the next."""
        limit = self.scratch.logits.shape[0]
        for first in range(0, rows, limit):
            count = min(limit, rows - first)
            part = replace(stream, values=stream.values[first:], stats=stream.stats[:, :, first:])
            self._head(part, count, "prefill")
            yield self.scratch.logits[:count]

    def _blocks(
        self, rows: int, phase: Phase, attend: Callable[[int, Layer], None], last: Tensor | None = None
    ) -> Operand:
        scratch = self.scratch
        stream = scratch.stream(self.layers[0].down.tile(rows, phase).outputs)
        self._embed(rows, stream, last)
        for number, layer in enumerate(self.layers):
            column = 0
            for linear in layer.qkv:
                self._run(linear, stream, rows, Store(scratch.qkv, column), phase)
                column += linear.outputs
            attend(number, layer)
            between = scratch.between(layer.o.tile(rows, phase).outputs)
            self._run(layer.o, scratch.mixed, rows, Residual(scratch.x, between, layer.mlp_norm), phase)
            inner = self._inner(layer.first, between, rows, phase)
            stream = scratch.stream(layer.down.tile(rows, phase).outputs)
            self._run(layer.down, inner, rows, Residual(scratch.x, stream, layer.following_norm), phase)
        return stream

    def _inner(self, first: Sequence[DeviceLinear], stream: Operand, rows: int, phase: Phase) -> Operand:
        """act(gate) · up, or act(up): in the epilogue, or after two launches where the kinds differ."""
        spec, scratch = self.spec, self.scratch
        if len(first) == 1:
            outputs = first[0].tile(rows, phase).outputs
            inner = scratch.inner(outputs // 2 if spec.gated else outputs)
            self._run(first[0], stream, rows, Activate(inner, spec.activation, spec.gated), phase)
            return inner
        for linear, y in zip(first, scratch.apart, strict=True):
            self._run(linear, stream, rows, Store(y), phase)
        inner = scratch.inner(64)
        gate, up = (y[:rows] for y in scratch.apart)
        activation(gate, up, inner, kind=spec.activation, pdl=self.settings.pdl)
        return inner

    def _run(
        self,
        linear: DeviceLinear,
        stream: Operand,
        rows: int,
        output: Store | Residual | Activate,
        phase: Phase,
    ) -> None:
        operand: Operand | QuantizedOperand = stream
        dtype, static, pdl = linear.input_dtype, linear.input_scale, self.settings.pdl
        if dtype is not None and not stream.measured:
            operand = self.scratch.quantized(stream, dtype)
            values, scales = operand.values[:rows], operand.scales[:rows]
            quantize(stream.values[:rows], values, scales, static=static, pdl=pdl)
        elif dtype is not None and (phase == "prefill" or rows > 16):  # else every tile would do it again
            operand = self.scratch.quantized(stream, dtype)
            quantize_operand(stream, rows, operand, static=static, pdl=pdl)
        linear(operand, rows, output, phase, self.scratch.workspace, pdl=self.settings.pdl)

    def _head(self, stream: Operand, rows: int, phase: Phase) -> None:
        self._run(self.head, stream, rows, Store(self.scratch.logits), phase)

    def _embed(self, rows: int, stream: Operand, last: Tensor | None) -> None:
        scratch = self.scratch
        embed(
            scratch.tokens[:rows],
            self.table,
            scratch.x,
            stream,
            weight=self.first_norm,
            slots=None if last is None else scratch.slots[:rows],
            last=last,
            positions=None if self.positions is None else scratch.positions[:rows],
            position_table=self.positions,
            offset=self.spec.position_offset,
            pdl=self.settings.pdl,
        )

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes that one decode step reads of the weights, by kind."""
        norms = sum(layer.mlp_norm.nbytes + layer.following_norm.nbytes for layer in self.layers)
        linears = sum(linear.nbytes for layer in self.layers for linear in layer.linears())
        return {"linear": linears, "head": self.head.nbytes, "norm": norms}

    @property
    def held_bytes(self) -> int:
        """All weights: those of a step and the tables it reads a row of."""
        tables = (self.table, self.positions, self.cos, self.sin)
        return sum(self.weight_bytes.values()) + sum(t.nbytes for t in tables if t is not None)

    def kv_bytes(self, positions: Sequence[int]) -> int:
        """Keys and values that a step at these positions reads, sliding windows considered."""
        layers, blocks, _, size = self.cache.kv.shape[:4]
        per_position = self.cache.nbytes // (layers * blocks * size)
        windows = Counter(layer.window for layer in self.layers)
        read = sum(n * min(p + 1, w or p + 1) for w, n in windows.items() for p in positions)
        return per_position * read


def _interleave(linear: Linear) -> Linear:
    """Rows (gate 0, up 0, gate 1, up 1, ..): partners meet in one tile's epilogue."""
    outputs = linear.weight.shape[0]
    order = torch.arange(outputs).view(2, outputs // 2).t().flatten()
    return select(linear, order)
