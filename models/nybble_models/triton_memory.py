"""What a GPU step holds besides weights: the paged cache, and buffers for the widest batch and chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nybble_kernels.triton.attention_decode import counter_ints, default_splits, workspace_floats
from nybble_kernels.triton.epilogue import Operand
from nybble_kernels.triton.linear import DeviceLinear
from nybble_kernels.triton.quantize import QuantizedOperand
from nybble_kernels.triton.tiles import Phase, Workspace
from nybble_models.spec import ModelSpec

if TYPE_CHECKING:
    from nybble_models.triton_step import Settings

FINEST = 32  # columns of the narrowest tile that writes statistics: half a tile of gate and up
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class Cache:
    """kv [layers, blocks, 2, block_size, kv_heads, head_dim], and scales [.., kv_heads] for 8-bit types."""

    kv: Tensor
    scales: Tensor | None

    @classmethod
    def allocate(
        cls, spec: ModelSpec, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """Zeros, so that a stale position is never NaN."""
        shape = (spec.num_layers, blocks, 2, block_size, spec.num_kv_heads)
        kv = torch.zeros((*shape, spec.head_dim), dtype=dtype, device=device)
        return cls(kv, torch.zeros(shape, device=device) if dtype in QUANTIZED else None)

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows that run together in a decode step and in a prompt's chunk, and blocks of the longest sequence."""

    batch: int
    chunk: int
    blocks: int


class Scratch:
    """Buffers at fixed addresses: a captured launch finds them again."""

    def __init__(
        self, spec: ModelSpec, linears: Sequence[DeviceLinear], settings: Settings, sizes: Sizes
    ) -> None:
        device, dtype = settings.device, settings.dtype
        rows = max(sizes.batch, sizes.chunk)
        heads, inner = spec.num_heads * spec.head_dim, spec.intermediate_size
        self._rows = rows

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.inputs = torch.zeros(4, rows, dtype=torch.int32, device=device)  # one copy from the host a step
        self.tokens, self.positions, self.slots, place = self.inputs.unbind(0)
        self.place = place[:1]
        self.tables = torch.zeros(sizes.batch, sizes.blocks, dtype=torch.int32, device=device)
        self.x = floats(rows, spec.hidden_size)
        self.qkv = floats(rows, heads + 2 * spec.num_kv_heads * spec.head_dim)
        self.query = torch.zeros(rows, heads, dtype=dtype, device=device)
        self.logits = floats(sizes.batch, spec.vocab_size)
        self.apart = (floats(rows, inner), floats(rows, inner)) if spec.gated else ()
        norm = spec.norm
        self._values = {
            name: torch.zeros(rows, width, dtype=dtype, device=device)
            for name, width in (("stream", spec.hidden_size), ("between", spec.hidden_size), ("inner", inner))
        }
        self._stats = {name: floats(3 * -(-v.shape[1] // FINEST) * rows) for name, v in self._values.items()}
        self._norm = norm, spec.norm_eps
        widest = max((each.inputs for each in linears if each.quantizes), default=0)
        self._codes = torch.zeros(rows * widest, dtype=torch.int8, device=device)
        self._scales = floats(rows)
        mixed = torch.zeros(rows, heads, dtype=dtype, device=device)
        self.mixed = Operand(mixed, floats(3, 1, rows), heads, measured=False)
        self.splits = default_splits(spec.num_kv_heads, settings.tuning.processors)
        size = workspace_floats(sizes.batch, spec.num_heads, spec.head_dim, self.splits)
        self.attention = floats(size)
        counters = counter_ints(sizes.batch, spec.num_kv_heads)
        self.attention_counters = torch.zeros(counters, dtype=torch.int32, device=device)
        limits: dict[Phase, int] = {"decode": sizes.batch, "prefill": sizes.chunk}
        uses = [
            (each.tile(count, phase), each.outputs, count)
            for each in linears
            for phase, limit in limits.items()
            for count in {min(limit, c) for c in (1, 16, 32, 64, limit)}
        ]
        self.workspace = Workspace.allocate(uses, device)

    def quantized(self, source: Operand, dtype: torch.dtype) -> QuantizedOperand:
        """Room for an operand in 8 bits."""
        codes = self._codes[: self._rows * source.width].view(dtype).view(self._rows, source.width)
        return QuantizedOperand(codes, self._scales, source)

    def stream(self, tile: int) -> Operand:
        """The attention norm's operand, written `tile` columns at a time."""
        return self._operand("stream", tile, *self._norm)

    def between(self, tile: int) -> Operand:
        """The feed-forward norm's operand."""
        return self._operand("between", tile, *self._norm)

    def inner(self, tile: int) -> Operand:
        """The input of `down`: no norm before it."""
        return self._operand("inner", tile, None, 0.0)

    def _operand(self, name: str, tile: int, norm: str | None, eps: float) -> Operand:
        values = self._values[name]
        tiles = -(-values.shape[1] // tile)
        stats = self._stats[name][: 3 * tiles * self._rows].view(3, tiles, self._rows)
        return Operand(values, stats, tile, norm, eps)

    @property
    def nbytes(self) -> int:
        held = (self.x, self.qkv, self.query, self.logits, *self.apart, self.mixed.values, self.attention)
        return sum(
            t.nbytes for t in (*held, *self._values.values(), *self._stats.values(), self.workspace.partial)
        )
