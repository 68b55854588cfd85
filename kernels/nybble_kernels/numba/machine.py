"""Compile a module of hand-written IR for one processor, keep the object on disk, and hand out addresses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Lock
from typing import Any

from llvmlite import binding, ir

from nybble_kernels.numba.attention_kernels import emit_attention
from nybble_kernels.numba.dequantize import dequantize_name, emit_dequantize
from nybble_kernels.numba.gemm import emit_gemm
from nybble_kernels.numba.gemv import emit_gemv, gemv_name
from nybble_kernels.numba.gemv_float import emit_float
from nybble_kernels.numba.isa import Isa
from nybble_kernels.numba.layout import STREAMS, TILES, TOGETHER, Format
from nybble_kernels.numba.quantize_kernel import emit_quantize


def build_module(isa: Isa, form: Format | None = None) -> str:
    """The LLVM IR, for one instruction set, of the kernels that read a format, or of all the others."""
    module = ir.Module(f"nybble_{isa.name}")
    if form is not None:
        for tile in reversed(TILES):  # larger ones call smaller ones
            (emit_gemm if tile >= TOGETHER else emit_gemv)(module, isa, form, tile)
        emit_gemv(module, isa, form, 1, blocks=2)
        emit_dequantize(module, isa, form)
        return str(module)
    for tile in TILES:
        emit_float(module, isa, tile)
    emit_attention(module)
    emit_quantize(module)
    return str(module)


@dataclass(frozen=True)
class Target:
    """What LLVM compiles for. `host()` is this machine; others can be compiled but not run here."""

    cpu: str
    features: str
    triple: str

    @classmethod
    def host(cls) -> Target:
        features = binding.get_host_cpu_features().flatten() if _can_ask() else ""
        return cls(binding.get_host_cpu_name(), features, binding.get_process_triple())

    def machine(self) -> Any:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        target = binding.Target.from_triple(self.triple)
        return target.create_target_machine(cpu=self.cpu, features=self.features, opt=3, jit=True)


def _can_ask() -> bool:
    try:
        binding.get_host_cpu_features()
    except RuntimeError:
        return False
    return True


def optimise(text: str, machine: Any) -> Any:
    """Parse, verify and run the -O3 pipeline."""
    module = binding.parse_assembly(text)
    module.triple = machine.triple
    module.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return module


def assembly(isa: Isa, target: Target, form: Format | None = None) -> str:
    """What the kernels become on another processor, as text."""
    machine = target.machine()
    return str(machine.emit_assembly(optimise(build_module(isa, form), machine)))


class Kernels:
    """The block kernels of one instruction set, as addresses. Those of a format load when it is first met."""

    def __init__(self, isa: Isa, cache: Path) -> None:
        self.isa = isa
        self._cache = cache
        self._target = Target.host()
        self._machine = self._target.machine()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), self._machine)
        self._loaded: set[Format | None] = set()
        self._addresses: dict[str, int] = {}
        self._lock = Lock()

    def __getitem__(self, name: str) -> int:
        """A kernel that reads no format."""
        return self._address(name, None)

    def gemv(self, form: Format, tile: int, blocks: int = STREAMS) -> int:
        return self._address(gemv_name(form, tile, blocks), form)

    def dequantize(self, form: Format) -> int:
        return self._address(dequantize_name(form), form)

    def _address(self, name: str, form: Format | None) -> int:
        with self._lock:
            if name not in self._addresses:
                self._load(form)
                self._addresses[name] = int(self._engine.get_function_address(name))
            return self._addresses[name]

    def _load(self, form: Format | None) -> None:
        if form not in self._loaded:
            code = _object(self.isa, form, self._target, self._machine, self._cache)
            self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
            self._engine.finalize_object()
            self._loaded.add(form)


def _object(isa: Isa, form: Format | None, target: Target, machine: Any, cache: Path) -> bytes:
    """Machine code from the cache folder, which belongs to one version of the source, or compiled into it."""
    key = hashlib.sha256(repr((target, binding.llvm_version_info)).encode()).hexdigest()[:16]
    path = cache / f"{isa.name}-{'base' if form is None else form.name}-{key}.o"
    if path.exists():
        return path.read_bytes()
    code: bytes = machine.emit_object(optimise(build_module(isa, form), machine))
    with NamedTemporaryFile(dir=cache, delete=False) as file:
        file.write(code)
    Path(file.name).replace(path)
    return code
