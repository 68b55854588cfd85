"""y[m, n] = sum over groups of scale * (sum of codes * activations - offset terms), four blocks of 16 rows.

Integer dot products of 32 inputs are exact; each is scaled by its activation scale, summed over the weight
group, and scaled by the weight scale. A row of the batch goes through the same operations in the same order
whatever the tile, so its result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from nybble_kernels.numba.dots import DOTS, Word
from nybble_kernels.numba.emit import F32, I8, I16, I32, I64, PTR, Emitter, filled, vector
from nybble_kernels.numba.isa import PLAIN, Isa
from nybble_kernels.numba.layout import ROWS, STREAMS, SUB, Format

PREFETCH_BYTES = 8192
"""Ahead of the codes. On Zen 3 from memory, GB/s: none 7.0, 1024 9.0, 4096 10.9, 8192 to 65536 11.7."""

ARGUMENTS = (PTR, I64, PTR, I64, PTR, I64, I64, I64, I64)
"""first block, bytes between streams, activations, bytes between rows, y, bytes between rows, groups, subs,
blocks (two or four; a single row has a kernel for each)
"""


def gemv_name(form: Format, tile: int, blocks: int = STREAMS) -> str:
    return f"{form.name}_m{tile}" if blocks == STREAMS else f"{form.name}_m{tile}_b{blocks}"


def emit_gemv(module: Any, isa: Isa, form: Format, tile: int, blocks: int = STREAMS) -> None:
    """The function `gemv_name(form, tile, blocks)`: `tile` rows of activations by four blocks, or fewer.

    A single row is bound by memory: its blocks are read side by side, each from a stream of its own. Two rows
    lie between that and what `gemm` is for.
    """
    Gemv(module, isa, form, tile, blocks).emit()


class Gemv:
    def __init__(self, module: Any, isa: Isa, form: Format, tile: int, blocks: int = STREAMS) -> None:
        self.e = Emitter(module, gemv_name(form, tile, blocks), ARGUMENTS)
        self.isa, self.form, self.tile = isa, form, tile
        self.floats, self.words = vector(F32, isa.lanes), vector(I32, isa.lanes)
        self.block, self.stream, first, stride, self.y, self.y_stride, *sizes = self.e.function.args
        self.groups, self.subs, self.count = sizes
        self.rows = [self.e.at(first, self.e.times(stride, m)) for m in range(tile)]
        all_subs = self.e.times(self.groups, self.subs)
        self.scale_at = self.e.times(all_subs, SUB)  # inside an activation row
        self.sum_at = self.e.plus(self.scale_at, self.e.times(all_subs, 4))
        self.total_at = self.e.plus(self.sum_at, self.e.times(all_subs, 4))
        self.streams = max(1, min(blocks, STREAMS // tile))  # side by side
        self.parts = range(self.streams * ROWS // isa.lanes)  # vectors that make the rows of the blocks

    def emit(self) -> None:
        e = self.e
        turns = 1 if self.tile == 1 else e.b.udiv(self.count, e.i64(self.streams))
        with e.loop(turns) as turn:
            number = e.times(turn, self.streams)
            block = e.at(self.block, e.times(number, self.stream))
            self._blocks(block, e.at(self.y, e.times(number, 4 * ROWS)))
        e.b.ret_void()

    def _blocks(self, block: Any, y: Any) -> None:
        e, form = self.e, self.form
        count = self.tile * len(self.parts)
        outer, inner = e.variables(self.floats, count), e.variables(self.floats, count)
        sums = e.variables(F32, self.tile)
        for slot in outer:
            e.b.store(filled(self.floats, 0.0), slot)
        group_bytes = e.times(self.subs, form.sub_bytes)
        scales = e.at(block, e.times(self.groups, group_bytes))
        offsets = e.at(scales, e.times(self.groups, form.scale_bytes))
        with e.loop(self.groups) as group:
            for slot in inner:
                e.b.store(filled(self.floats, 0.0), slot)
            for slot in sums:
                e.b.store(F32(0.0), slot)
            codes = e.at(block, e.times(group, group_bytes))
            with e.loop(self.subs) as sub:
                number = e.plus(e.times(group, self.subs), sub)
                self._sub_group(e.at(codes, e.times(sub, form.sub_bytes)), number, inner)
            with e.loop(self.subs) as sub:  # apart, as registers are short above
                self._add_sums(e.times(e.plus(e.times(group, self.subs), sub), 4), sums)
            scale = e.at(scales, e.times(group, form.scale_bytes))
            offset = e.at(offsets, e.times(group, form.offset_bytes))
            self._close_group(scale, offset, outer, inner, sums)
        for m in range(self.tile):
            for part in self.parts:
                value = e.get(outer[m * len(self.parts) + part], self.floats)
                e.store(value, y, e.times(self.y_stride, m), 4 * self.isa.lanes * part, align=4)

    def _place(self, base: Any, part: int, lane_bytes: int) -> Any:
        """Where a vector's lanes begin, in the stream of its block."""
        stream, within = divmod(part * self.isa.lanes, ROWS)
        return self.e.at(base, self.e.times(self.stream, stream), within * lane_bytes)

    def _sub_group(self, codes: Any, number: Any, inner: list[Any]) -> None:
        """inner += scale * dot over 32 inputs."""
        e = self.e
        for stream in range(self.streams):
            for line in range(0, self.form.sub_bytes, 64):
                e.prefetch(codes, e.times(self.stream, stream), PREFETCH_BYTES + line)
        at = e.times(number, 4)
        for part in self.parts:
            for m, dot in enumerate(self._dots(self._weights(codes, part), number)):
                self._add(dot, self.rows[m], at, inner[m * len(self.parts) + part])

    def _dots(self, weights: Word, number: Any) -> Iterator[Any]:
        """Of every row. Fewer than 8 bits are unpacked once, and met by one row after another."""
        e, dots, bits = self.e, DOTS[self.isa], self.form.bits
        activations = [partial(self._activations, row, number) for row in self.rows]
        totals = [e.load(I32, row, self.total_at, e.times(number, 4), align=4) for row in self.rows]
        if bits == 8:
            yield from dots(e, bits, weights, activations, totals)
            return
        unpacked = [weights(i) for i in range(8)]
        for row, total in zip(activations, totals, strict=True):
            yield from dots(e, bits, unpacked.__getitem__, [row], [total])

    def _add(self, dot: Any, row: Any, at: Any, slot: Any) -> None:
        """slot += scale of the activations * dot."""
        e = self.e
        scale = e.splat(e.load(F32, row, self.scale_at, at, align=4), self.isa.lanes)
        e.b.store(e.fma(e.b.sitofp(dot, self.floats), scale, e.get(slot, self.floats)), slot)

    def _add_sums(self, at: Any, sums: list[Any]) -> None:
        """sums += scale * sum of the activations."""
        e = self.e
        for slot, row in zip(sums, self.rows, strict=True):
            e.b.store(e.b.fadd(e.get(slot, F32), e.load(F32, row, self.sum_at, at, align=4)), slot)

    def _weights(self, codes: Any, part: int) -> Word:
        """The eight words of a sub-group for the rows of one vector."""
        e, form, start = self.e, self.form, self._place(codes, part, 4)

        def stored(at: int) -> Any:
            return e.load(self.words, start, 4 * ROWS * at, align=16)

        def word(i: int) -> Any:
            value, before = None, 0
            for width, low in form.planes:
                at, place = divmod(i * width, 8)
                found = stored(before + at)
                if width < 8:
                    mask = filled(self.words, 0x01010101 * ((2**width - 1) << low))
                    found = e.b.and_(self._moved(found, low - place), mask)
                value = found if value is None else e.b.or_(value, found)
                before += width
            return value

        return word

    def _moved(self, word: Any, up: int) -> Any:
        """Bits moved up (or down) in all lanes; what crosses into the next byte is for a mask to remove."""
        if up == 0:
            return word
        shift = self.e.b.shl if up > 0 else self.e.b.lshr
        return shift(word, filled(self.words, abs(up)))

    def _activations(self, row: Any, number: Any, i: int) -> Any:
        """Word i of a row's sub-group, in every lane."""
        e = self.e
        return e.splat(e.load(I32, row, e.times(number, SUB), 4 * i, align=4), self.isa.lanes)

    def _close_group(
        self, scales: Any, offsets: Any, outer: list[Any], inner: list[Any], sums: list[Any]
    ) -> None:
        """outer += scale * (inner - zero * sum), or scale * inner + minimum * sum."""
        e, lanes, form = self.e, self.isa.lanes, self.form
        for part in self.parts:
            scale = self._real(scales, part)
            offset = self._offset(offsets, part)
            for m in range(self.tile):
                slot = m * len(self.parts) + part
                total = e.splat(e.get(sums[m], F32), lanes)
                value, result = e.get(inner[slot], self.floats), e.get(outer[slot], self.floats)
                if form.offsets == "minimum":
                    if form.bits == 8:  # codes are stored 128 lower
                        value = e.fma(filled(self.floats, 128.0), total, value)
                    result = e.fma(offset, total, e.fma(scale, value, result))
                else:
                    if form.offsets == "zero" or form.middle:
                        value = e.fma(offset, total, value)
                    result = e.fma(scale, value, result)
                e.b.store(result, outer[slot])

    def _offset(self, base: Any, part: int) -> Any:
        """float32 lanes of minimums, or of zeros with the other sign."""
        if self.form.offsets == "none":
            return filled(self.floats, -float(self.form.middle))
        return self._real(base, part) if self.form.offsets == "minimum" else self._negative_zero(base, part)

    def _real(self, base: Any, part: int) -> Any:
        """float32 lanes of scales or minimums."""
        e, lanes = self.e, self.isa.lanes
        if not self.form.half:
            return e.load(self.floats, self._place(base, part, 4), align=4)
        bits = e.load(vector(I16, lanes), self._place(base, part, 2), align=2)
        return e.floats_of_half(bits, self.isa is not PLAIN)

    def _negative_zero(self, base: Any, part: int) -> Any:
        """-zero; codes of 8 bits are stored 128 lower, and so is their zero."""
        e = self.e
        zero = e.b.zext(e.load(vector(I8, self.isa.lanes), self._place(base, part, 1)), self.words)
        lowered = e.b.sub(filled(self.words, 128 if self.form.bits == 8 else 0), zero)
        return e.b.sitofp(lowered, self.floats)
