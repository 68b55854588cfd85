"""Integer dot products of 32 inputs for `lanes` rows at once, one strategy per instruction set.

All strategies give the same integers, so every instruction set gives the same bits.

A sub-group is 32 inputs as 8 words: word i of a row holds its codes 4i .. 4i+3, one a byte. Codes of 2 to 7
bits are unsigned, of 8 bits signed. Activations are signed bytes in [-127, 127], one word in every lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from nybble_kernels.numba.emit import I8, I16, I32, Emitter, filled, vector
from nybble_kernels.numba.isa import AVX2, AVX512_VNNI, AVX_VNNI, NEON, PLAIN, Isa

Word = Callable[[int], Any]
Dots = Callable[[Emitter, int, Word, Sequence[Word], Sequence[Any]], list[Any]]
"""dots(emitter, bits, weights, activations of every row, their sums) -> i32 lanes of every row.

`weights(i)` emits word i of the codes, `activations[m](i)` of a row; sums are i32 scalars. A word of codes
meets all rows that are given before the next is asked for, so that only their sums stay in registers.
"""


def _plain(
    e: Emitter, bits: int, weights: Word, activations: Sequence[Word], totals: Sequence[Any]
) -> list[Any]:
    """Widen each byte to 32 bits, multiply, add: right on any processor."""
    results: list[Any] = []
    for i in range(8):
        weight = weights(i)
        kind = weight.type
        results = results or [filled(kind, 0)] * len(activations)
        widen, top = e.b.lshr if bits < 8 else e.b.ashr, filled(kind, 24)
        for byte in range(4):
            up = filled(kind, 24 - 8 * byte)
            w = widen(e.b.shl(weight, up), top)
            for m, row in enumerate(activations):
                a = e.b.ashr(e.b.shl(row(i), up), top)
                results[m] = e.b.add(results[m], e.b.mul(w, a))
    return results


def _avx2(
    e: Emitter, bits: int, weights: Word, activations: Sequence[Word], totals: Sequence[Any]
) -> list[Any]:
    """vpmaddubsw into 16 bits, then vpmaddwd with ones into 32.

    4 bits: eight sums of two products reach 8 * 2 * 15 * 127 = 30480, inside 16 bits, so one vpmaddwd serves
    all eight words; of 5 bits it serves four, of 6 two, of 7 one. 8 bits: |w| times (a with w's sign) sums to
    2 * 128 * 127 = 32512, one vpmaddwd a word.
    """
    bytes_, shorts, words = vector(I8, 32), vector(I16, 16), vector(I32, 8)
    ones = filled(shorts, 1)
    together = 1 if bits == 8 else min(8, 32767 // (2 * 127 * (2**bits - 1)))
    sums: list[Any] = [None] * len(activations)
    results: list[Any] = [None] * len(activations)
    for i in range(8):
        w = e.b.bitcast(weights(i), bytes_)
        size = e.call("llvm.abs.v32i8", bytes_, w, I1_FALSE) if bits == 8 else w
        for m, row in enumerate(activations):
            a = e.b.bitcast(row(i), bytes_)
            if bits == 8:
                a = e.call("llvm.x86.avx2.psign.b", bytes_, a, w)
            product = e.call("llvm.x86.avx2.pmadd.ub.sw", shorts, size, a)
            sums[m] = product if i % together == 0 else e.b.add(sums[m], product)
            if i % together == together - 1:
                wide = e.call("llvm.x86.avx2.pmadd.wd", words, sums[m], ones)
                results[m] = wide if results[m] is None else e.b.add(results[m], wide)
    return results


def _vnni(
    e: Emitter, bits: int, weights: Word, activations: Sequence[Word], totals: Sequence[Any]
) -> list[Any]:
    """vpdpbusd: four products of unsigned by signed bytes, added to 32 bits; signed codes rise by 128."""
    results: list[Any] = []
    for i in range(8):
        weight = weights(i)
        words = weight.type
        bytes_ = vector(I8, 4 * words.count)
        if i == 0:
            results = [filled(words, 0)] * len(activations)
            if bits == 8:
                results = [e.splat(e.b.mul(total, I32(-128)), words.count) for total in totals]
        if bits == 8:
            weight = e.b.xor(weight, filled(words, -0x7F7F7F80))
        w, dot = e.b.bitcast(weight, bytes_), f"llvm.x86.avx512.vpdpbusd.{32 * words.count}"
        results = [
            e.call(dot, words, result, w, e.b.bitcast(row(i), bytes_))
            for result, row in zip(results, activations, strict=True)
        ]
    return results


def _neon(
    e: Emitter, bits: int, weights: Word, activations: Sequence[Word], totals: Sequence[Any]
) -> list[Any]:
    """sdot: four products of signed bytes, added to 32 bits; codes of up to 7 bits are positive as such."""
    words, bytes_ = vector(I32, 4), vector(I8, 16)
    results = [filled(words, 0)] * len(activations)
    for i in range(8):
        w = e.b.bitcast(weights(i), bytes_)
        results = [
            e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", words, result, w, e.b.bitcast(row(i), bytes_))
            for result, row in zip(results, activations, strict=True)
        ]
    return results


I1_FALSE = ir.Constant(ir.IntType(1), 0)

DOTS: dict[Isa, Dots] = {PLAIN: _plain, AVX2: _avx2, AVX_VNNI: _vnni, AVX512_VNNI: _vnni, NEON: _neon}
