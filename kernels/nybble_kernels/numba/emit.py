"""Writing LLVM IR by hand: the few shapes of code that the kernels are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, VOID, PTR = ir.HalfType(), ir.FloatType(), ir.VoidType(), ir.PointerType()


def vector(element: Any, lanes: int) -> Any:
    return ir.VectorType(element, lanes)


def filled(kind: Any, value: float) -> Any:
    """A vector constant with the same value in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def size_of(kind: Any) -> int:
    """Bytes of a scalar or vector type."""
    if isinstance(kind, ir.VectorType):
        return int(kind.count) * size_of(kind.element)
    return {F32: 4, F16: 2}.get(kind) or int(kind.width) // 8


class Emitter:
    """One function being written. Offsets are in bytes, and may be Python integers or IR values."""

    def __init__(self, module: Any, name: str, arguments: Sequence[Any]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Call an intrinsic or another function of the module by name."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(function, arguments)

    def i64(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def _offset(self, value: Any) -> Any:
        return self.i64(value) if isinstance(value, int) else value

    def at(self, base: Any, *offsets: Any) -> Any:
        """The pointer `base + sum(offsets)`."""
        for offset in offsets:
            base = self.b.gep(base, [self._offset(offset)], source_etype=I8)
        return base

    def load(self, kind: Any, base: Any, *offsets: Any, align: int = 1) -> Any:
        return self.b.load(self.at(base, *offsets), typ=kind, align=align)

    def store(self, value: Any, base: Any, *offsets: Any, align: int = 1) -> None:
        self.b.store(value, self.at(base, *offsets), align=align)

    def times(self, a: Any, b: Any) -> Any:
        return self.b.mul(self._offset(a), self._offset(b))

    def plus(self, a: Any, b: Any) -> Any:
        return self.b.add(self._offset(a), self._offset(b))

    def splat(self, scalar: Any, lanes: int) -> Any:
        kind = vector(scalar.type, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), filled(vector(I32, lanes), 0))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once: the same bits on every processor."""
        kind = a.type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{suffix}", kind, a, b, c)

    def prefetch(self, base: Any, *offsets: Any) -> None:
        read, keep, data = I32(0), I32(3), I32(1)
        self.call("llvm.prefetch.p0", VOID, self.at(base, *offsets), read, keep, data)

    def variables(self, kind: Any, count: int) -> list[Any]:
        """Mutable values (promoted to registers by LLVM), zero at first."""
        return [self.variable(ir.Constant(kind, None)) for _ in range(count)]

    def variable(self, value: Any) -> Any:
        with self.b.goto_entry_block():
            slot = self.b.alloca(value.type)
        self.b.store(value, slot)
        return slot

    def get(self, slot: Any, kind: Any) -> Any:
        return self.b.load(slot, typ=kind)

    @contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """for index in range(count), index: i64."""
        before = self.b.block
        head = self.b.append_basic_block("head")
        body = self.b.append_basic_block("body")
        after = self.b.append_basic_block("after")
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(self.i64(0), before)
        self.b.cbranch(self.b.icmp_signed("<", index, self._offset(count)), body, after)
        self.b.position_at_end(body)
        yield index
        index.add_incoming(self.b.add(index, self.i64(1)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    def floats_of_half(self, bits: Any, native: bool) -> Any:
        """float32 lanes of IEEE half bits (i16 lanes). Without an instruction: shift, then scale by 2^112."""
        lanes = bits.type.count
        if native:
            return self.b.fpext(self.b.bitcast(bits, vector(F16, lanes)), vector(F32, lanes))
        kind = vector(I32, lanes)
        wide = self.b.zext(bits, kind)
        magnitude = self.b.shl(self.b.and_(wide, filled(kind, 0x7FFF)), filled(kind, 13))
        value = self.b.fmul(
            self.b.bitcast(magnitude, vector(F32, lanes)), filled(vector(F32, lanes), 2.0**112)
        )
        sign = self.b.shl(self.b.and_(wide, filled(kind, 0x8000)), filled(kind, 16))
        return self.b.bitcast(self.b.or_(self.b.bitcast(value, kind), sign), vector(F32, lanes))

    def floats_of_bfloat(self, bits: Any) -> Any:
        """float32 lanes of bfloat16 bits (i16 lanes): the upper half of the word."""
        lanes = bits.type.count
        kind = vector(I32, lanes)
        return self.b.bitcast(self.b.shl(self.b.zext(bits, kind), filled(kind, 16)), vector(F32, lanes))
