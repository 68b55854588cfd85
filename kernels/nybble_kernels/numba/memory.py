"""Memory by address inside compiled code: loads, stores, bit casts, atomics, and calls through an address.

Addresses are int64. `get_f32(p, i)` reads element i of the float32 values at p; `set_f32(p, i, v)` writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_I32 = ir.IntType(32)


def _pointer(builder: Any, base: Any, index: Any, element: Any) -> Any:
    pointer = builder.inttoptr(base, ir.PointerType())
    return builder.gep(pointer, [index], source_etype=element)


def _getter(stored: Any, returned: Any, widen: str | None = None) -> Callable[[int, int], Any]:
    """Reads an element; integers narrower than the result are widened (`zext` or `sext`)."""

    def get(typing: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], args[1], stored), typ=stored)
            return value if widen is None else getattr(builder, widen)(value, _I64)

        return returned(types.int64, types.int64), generate

    return cast(Callable[[int, int], Any], intrinsic(get))


def _setter(stored: Any, given: Any, narrow: bool = False) -> Callable[[int, int, Any], None]:
    def put(typing: Any, base: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.trunc(args[2], stored) if narrow else args[2]
            builder.store(value, _pointer(builder, args[0], args[1], stored))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, given), generate

    return cast(Callable[[int, int, Any], None], intrinsic(put))


get_f32: Callable[[int, int], float] = _getter(_F32, types.float32)
get_u16: Callable[[int, int], int] = _getter(ir.IntType(16), types.int64, "zext")
get_i32: Callable[[int, int], int] = _getter(_I32, types.int64, "sext")
get_i64: Callable[[int, int], int] = _getter(_I64, types.int64)
set_f32 = _setter(_F32, types.float32)
set_u16 = _setter(ir.IntType(16), types.int64, narrow=True)


def _unary(given: Any, returned: Any, generate: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def one(typing: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return generate(builder, args[0])

        return returned(given), code

    return cast(Callable[[Any], Any], intrinsic(one))


def _llvm_float(name: str) -> Callable[[Any, Any], Any]:
    def generate(builder: Any, value: Any) -> Any:
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(_F32, [_F32]), name)
        return builder.call(function, [value])

    return generate


bits_of_f32: Callable[[float], int] = _unary(
    types.float32, types.int64, lambda b, v: b.zext(b.bitcast(v, _I32), _I64)
)
f32_of_bits: Callable[[int], float] = _unary(
    types.int64, types.float32, lambda b, v: b.bitcast(b.trunc(v, _I32), _F32)
)
rint_f32: Callable[[float], float] = _unary(types.float32, types.float32, _llvm_float("llvm.rint.f32"))
sqrt_f32: Callable[[float], float] = _unary(types.float32, types.float32, _llvm_float("llvm.sqrt.f32"))
int_of_f32: Callable[[float], int] = _unary(
    types.float32, types.int64, lambda b, v: b.sext(b.fptosi(v, _I32), _I64)
)


def _atomic(arguments: int, generate: Callable[..., Any]) -> Callable[..., int]:
    """An operation on the int64 at an address, sequentially consistent."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return generate(builder, builder.inttoptr(args[0], _I64.as_pointer()), *args[1:])

    def one(typing: Any, address: Any) -> Any:
        return types.int64(types.int64), code

    def two(typing: Any, address: Any, value: Any) -> Any:
        return types.int64(types.int64, types.int64), code

    def three(typing: Any, address: Any, old: Any, new: Any) -> Any:
        return types.int64(types.int64, types.int64, types.int64), code

    return cast(Callable[..., int], intrinsic((one, two, three)[arguments - 1]))


def _store(builder: Any, pointer: Any, value: Any) -> Any:
    builder.store_atomic(value, pointer, "seq_cst", 8)
    return value


def _swap_if(builder: Any, pointer: Any, old: Any, new: Any) -> Any:
    return builder.zext(builder.extract_value(builder.cmpxchg(pointer, old, new, "seq_cst"), 1), _I64)


atomic_get = _atomic(1, lambda b, p: b.load_atomic(p, "seq_cst", 8, typ=_I64))
atomic_set = _atomic(2, _store)
swap_if = _atomic(3, _swap_if)
"""swap_if(address, old, new) -> 1 where the value was `old` and now is `new`, else 0."""


def _relax(typing: Any) -> Any:
    """Tell the processor that this is a spin loop."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if builder.module.triple.startswith(("x86_64", "i686")):
            name = "llvm.x86.sse2.pause"
            pause = builder.module.globals.get(name)
            if pause is None:
                pause = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), code


relax = cast(Callable[[], None], intrinsic(_relax))


def _caller(arguments: int, returned: Any, result: Any) -> Callable[..., Any]:
    """Call the C function at an address with int64 arguments."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(returned, [_I64] * arguments)
        function = builder.inttoptr(args[0], kind.as_pointer())
        value = builder.call(function, args[1:])
        return context.get_dummy_value() if result is types.void else value

    def none(typing: Any, address: Any) -> Any:
        return result(types.int64), generate

    def one(typing: Any, address: Any, a: Any) -> Any:
        return result(types.int64, types.int64), generate

    def three(typing: Any, address: Any, a: Any, b: Any, c: Any) -> Any:
        return result(*[types.int64] * 4), generate

    def seven(typing: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return result(*[types.int64] * 8), generate

    def nine(
        typing: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any
    ) -> Any:
        return result(*[types.int64] * 10), generate

    shapes = {0: none, 1: one, 3: three, 7: seven, 9: nine}
    return cast(Callable[..., Any], intrinsic(shapes[arguments]))


call_libc0 = _caller(0, _I32, types.int32)
call_libc1 = _caller(1, _I32, types.int32)
call_dequantize = _caller(7, ir.VoidType(), types.void)
call_quantize = _caller(3, ir.VoidType(), types.void)
call_gemv = call_pages = _caller(9, ir.VoidType(), types.void)
