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

Dot = Callable[[Emitter, int, Sequence[Any], Sequence[Any], Any], Any]
"""dot(emitter, bits, weights, activations, activation_sum) -> i32 lanes. The sum is an i32 scalar."""


def _plain(e: Emitter, bits: int, weights: Sequence[Any], activations: Sequence[Any], total: Any) -> Any:
    """Widen each byte to 32 bits, multiply, add: right on any processor."""
    kind = weights[0].type
    widen = e.b.lshr if bits < 8 else e.b.ashr
    top = filled(kind, 24)
    result = filled(kind, 0)
    for weight, activation in zip(weights, activations, strict=True):
        for byte in range(4):
            up = filled(kind, 24 - 8 * byte)
            w = widen(e.b.shl(weight, up), top)
            a = e.b.ashr(e.b.shl(activation, up), top)
            result = e.b.add(result, e.b.mul(w, a))
    return result


def _avx2(e: Emitter, bits: int, weights: Sequence[Any], activations: Sequence[Any], total: Any) -> Any:
    """vpmaddubsw into 16 bits, then vpmaddwd with ones into 32.

    4 bits: eight sums of two products reach 8 * 2 * 15 * 127 = 30480, inside 16 bits, so one vpmaddwd serves
    all eight words; of 5 bits it serves four, of 6 two, of 7 one. 8 bits: |w| times (a with w's sign) sums to
    2 * 128 * 127 = 32512, one vpmaddwd a word.
    """
    bytes_, shorts, words = vector(I8, 32), vector(I16, 16), vector(I32, 8)
    ones = filled(shorts, 1)
    together = 1 if bits == 8 else min(8, 32767 // (2 * 127 * (2**bits - 1)))
    result: Any = None
    for first in range(0, 8, together):
        short: Any = None
        for i in range(first, first + together):
            w, a = e.b.bitcast(weights[i], bytes_), e.b.bitcast(activations[i], bytes_)
            if bits == 8:
                a = e.call("llvm.x86.avx2.psign.b", bytes_, a, w)
                w = e.call("llvm.abs.v32i8", bytes_, w, I1_FALSE)
            product = e.call("llvm.x86.avx2.pmadd.ub.sw", shorts, w, a)
            short = product if short is None else e.b.add(short, product)
        wide = e.call("llvm.x86.avx2.pmadd.wd", words, short, ones)
        result = wide if result is None else e.b.add(result, wide)
    return result


def _vnni(e: Emitter, bits: int, weights: Sequence[Any], activations: Sequence[Any], total: Any) -> Any:
    """vpdpbusd: four products of unsigned by signed bytes, added to 32 bits; signed codes rise by 128."""
    words = weights[0].type
    bytes_ = vector(I8, 4 * words.count)
    result = filled(words, 0)
    if bits == 8:
        result = e.splat(e.b.mul(total, I32(-128)), words.count)
    for weight, activation in zip(weights, activations, strict=True):
        if bits == 8:
            weight = e.b.xor(weight, filled(words, -0x7F7F7F80))
        w, a = e.b.bitcast(weight, bytes_), e.b.bitcast(activation, bytes_)
        result = e.call(f"llvm.x86.avx512.vpdpbusd.{32 * words.count}", words, result, w, a)
    return result


def _neon(e: Emitter, bits: int, weights: Sequence[Any], activations: Sequence[Any], total: Any) -> Any:
    """sdot: four products of signed bytes, added to 32 bits; codes of up to 7 bits are positive as such."""
    words = weights[0].type
    result = filled(words, 0)
    for weight, activation in zip(weights, activations, strict=True):
        w, a = (e.b.bitcast(v, vector(I8, 4 * words.count)) for v in (weight, activation))
        result = e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", words, result, w, a)
    return result


I1_FALSE = ir.Constant(ir.IntType(1), 0)

DOTS: dict[Isa, Dot] = {PLAIN: _plain, AVX2: _avx2, AVX_VNNI: _vnni, AVX512_VNNI: _vnni, NEON: _neon}
