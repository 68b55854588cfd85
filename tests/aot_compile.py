"""Compile case after case: `[table, case, arch]` comes in, a line each, and figures go out as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from support_aot import Case, Figures, cases
from support_chain import chain_faults, load_sources
from support_sass import GLOBAL_LOADS, Instruction, Program

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_PER_MULTIPROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """What a call hands to the compiler, specialised as it is at run time."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[int]
    options: dict[str, Any]


def record(case: Case, pdl: bool) -> Launch:
    """The launch that the call makes."""
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        found.append(specialise(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        case.call(pdl)
    names = [each.kernel.__name__ for each in found]
    chosen = [each for each in found if case.kernel in ("", each.kernel.__name__)]
    assert len(chosen) == 1, f"launches {names}; the case must name the one it means"
    return chosen[0]


def specialise(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As the JIT does: ones and None become constants, multiples of 16 are known to be."""
    names = set(kernel.arg_names)
    bound = kernel.signature.bind(*args, **{name: kwargs[name] for name in kwargs if name in names})
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for index, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        kind, divisible = kind_of(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = getattr(value, "value", value)
        elif divisible:
            aligned.append(index)
    options = {name: value for name, value in kwargs.items() if name not in names}
    return Launch(kernel, signature, constants, aligned, options)


def kind_of(value: Any, parameter: Any) -> tuple[str, bool]:
    """Type of an argument, and whether 16 is known to divide it."""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr", False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, value % 16 == 0 and not parameter.do_not_specialize
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"{parameter.name}: no launch takes {type(value).__name__}")


def compile_launch(launch: Launch, arch: int) -> Any:
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def measure(case: Case, arch: int) -> Figures:
    launch = record(case, pdl=arch >= 90)
    compiled = compile_launch(launch, arch)
    metadata = compiled.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", file.name))
        program = Program(tool("nvdisasm", "-c", "-g", "-ndf", file.name))
    assert usage is not None
    registers, stack, static = map(int, usage.groups())
    shared = metadata.shared + static
    code = program.code
    threads = 32 * metadata.num_warps
    sources = load_sources(compiled.asm["ttir"])

    def streamed(each: Instruction) -> float:
        """Bytes of the streams that a thread loads; its share, if all together load a tile repeatedly."""
        source = sources.get(each.place)
        if each.stem not in GLOBAL_LOADS or source is None or not source.pointers & set(case.streams):
            return 0
        return min(each.width, source.tile / threads)

    hot = [code[i] for i in program.hot(streamed)]
    loads = [each for each in code if each.stem in GLOBAL_LOADS]
    early = [code[i] for i in program.before_wait]
    chained = bool(launch.options.get("launch_pdl"))
    read = frozenset().union(*(sources[each.place].pointers for each in loads if streamed(each)))
    faults = {f"no load of {name} is found" for name in case.streams if name not in read}
    if chained:
        faults |= set(chain_faults(program, sources, case.before_wait))
    return Figures(
        kernel=launch.kernel.__name__,
        num_warps=metadata.num_warps,
        registers=registers,
        spills=sum(each.stem in ("LDL", "STL") for each in code),
        stack=stack,
        shared=shared,
        resident=resident(registers, shared, metadata.num_warps, arch),
        instructions=len(code),
        hot=len(hot),
        weights=8 * sum(map(streamed, hot)) / case.weight_bits if case.weight_bits else 0,
        loads=widths(loads),
        streamed=widths(each for each in loads if streamed(each)),
        counts=dict(Counter(each.stem for each in code)),
        loop_counts=dict(Counter(each.stem for each in hot)),
        chained=chained,
        early=sum(bool(streamed(each)) or each.prefetch for each in early) if chained else 0,
        faults=sorted(faults),
    )


def widths(loads: Iterable[Instruction]) -> dict[str, int]:
    return {str(width): n for width, n in sorted(Counter(each.width for each in loads).items(), reverse=True)}


def resident(registers: int, shared: int, warps: int, arch: int) -> int:
    """Programs that fit on a multiprocessor at once; each has 1 KiB of shared memory reserved."""
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    return min(32, 64 // warps, by_registers, SHARED_PER_MULTIPROCESSOR[arch] // (shared + 1024))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to the errors
    for line in sys.stdin:
        table, name, arch = json.loads(line)
        try:
            result = dataclasses.asdict(measure(cases(table)[name], arch))
        except Exception as error:
            cause = f"\n{error.__cause__}" if error.__cause__ else ""
            result = {"error": f"{type(error).__name__}: {str(error)[-1500:]}{cause[-1500:]}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
