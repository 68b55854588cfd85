"""What the compiler makes of a kernel, without a GPU: cases with limits, and the process that compiles them.

A case is a call of the op on meta tensors. Its launches are recorded, not run, so that argument types,
constants, warps and stages are those of a real call. A process that interprets kernels cannot compile any:
`aot_compile` does, in a process of its own for each version of Triton.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
DEVICE_TRITON = Path(os.environ.get("AOT_TRITON") or Path(sys.prefix) / "triton-3.6")
"""Where the older Triton is unpacked, the one that torch 2.11 brings along."""
ARCHS = (80, 90, 100)
MATMULS = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "IDP")


@dataclass(frozen=True)
class Limits:
    """What the machine code of one launch has to keep. "Hot" is the loop that reads the case's streams."""

    registers: int = 128
    shared: int = 100 * 1024
    resident: int = 1  # programs that one multiprocessor holds at once
    per_weight: float | None = None  # instructions in the hot loop per weight
    streamed: int = 16  # bytes of the narrowest load of a stream
    early: int = 0  # loads or prefetches of a stream before the wait of a chained launch
    needs: tuple[str, ...] = ()  # instructions that must occur, by how their names begin
    forbids: tuple[str, ...] = ()
    loop_stores: int | None = None  # stores to shared memory in the hot loop
    loop_barriers: int | None = None

    def but(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Case:
    """One launch to look at: `call(pdl)` runs the op, `kernel` names the launch where there are several.

    `streams` are the arguments that the kernel exists to read, weights or cache, `weight_bits` a piece;
    `before_wait` those it may read before the wait of a chained launch: no kernel it overlaps writes them.
    """

    name: str
    call: Callable[[bool], object]
    limits: Limits = Limits()
    at: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # what differs on an architecture
    streams: tuple[str, ...] = ()
    weight_bits: float = 0
    before_wait: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHS
    kernel: str = ""

    def limits_on(self, arch: int) -> Limits:
        return self.limits.but(**self.at.get(arch, {}))


@dataclass(frozen=True)
class Figures:
    """What a launch compiled to. Counts are instructions by the first part of their names."""

    kernel: str
    num_warps: int
    registers: int
    spills: int  # loads and stores of local memory
    stack: int
    shared: int
    resident: int
    instructions: int
    hot: int  # instructions in the hot loop, all where there is none
    weights: float  # per thread and turn of the hot loop
    loads: dict[str, int]  # all global loads, by bytes
    streamed: dict[str, int]  # the streamed ones
    counts: dict[str, int]
    loop_counts: dict[str, int]
    chained: bool
    early: int  # loads or prefetches of a stream before the wait
    faults: list[str]  # breaches of the protocol of chained launches

    @property
    def per_weight(self) -> float | None:
        return self.hot / self.weights if self.weights else None

    @property
    def summary(self) -> str:
        """All of it but the rarer instructions."""
        values = dataclasses.asdict(self)
        del values["counts"]
        common = sorted(values.pop("loop_counts").items(), key=lambda item: -item[1])[:16]
        rows = [f"{name}={value}" for name, value in values.items()]
        return " ".join([*rows, "hot loop:", *(f"{name}x{n}" for name, n in common)])

    @property
    def matmuls(self) -> dict[str, int]:
        return {name: n for name, n in self.counts.items() if name in MATMULS}


def breaches(figures: Figures, limits: Limits) -> list[str]:
    """What the figures exceed or lack, one line each."""
    found = list(figures.faults)
    ceilings: dict[str, tuple[float | None, float | None]] = {
        "spills": (figures.spills, 0),
        "stack": (figures.stack, 0),
        "registers": (figures.registers, limits.registers),
        "shared": (figures.shared, limits.shared),
        "instructions per weight": (figures.per_weight, limits.per_weight),
        "shared stores in the hot loop": (figures.loop_counts.get("STS", 0), limits.loop_stores),
        "barriers in the hot loop": (figures.loop_counts.get("BAR", 0), limits.loop_barriers),
    }
    for name, (value, ceiling) in ceilings.items():
        if ceiling is not None and (value is None or value > ceiling):
            found.append(f"{name}: {value if value is None else round(value, 2)}, at most {ceiling}")
    narrow = min(map(int, figures.streamed), default=limits.streamed)  # no streams, no narrow ones
    floors = {
        "bytes of a streamed load": (narrow, limits.streamed),
        "programs on a multiprocessor": (figures.resident, limits.resident),
        "streamed loads before the wait": (figures.early, limits.early if figures.chained else 0),
    }
    found.extend(
        f"{name}: {value}, at least {floor}" for name, (value, floor) in floors.items() if value < floor
    )
    present = tuple(figures.counts)
    found.extend(f"no {name}" for name in limits.needs if not any(each.startswith(name) for each in present))
    found.extend(f"has {name}" for name in limits.forbids if any(each.startswith(name) for each in present))
    return found


class CompileError(RuntimeError):
    """A case that does not compile, or the whole process that failed."""


class Compiler:
    """A process that compiles cases with one version of Triton; `folder` of None is the installed one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.results: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.process: subprocess.Popen[str] | None = None
        self.scratch = tempfile.TemporaryDirectory(prefix="aot-")

    def figures(self, table: str, case: str, arch: int) -> Figures:
        key = (table, case, arch)
        self.ask(*key)
        while key not in self.results:
            self._read()
        result = self.results[key]
        if "error" in result:
            raise CompileError(result["error"])
        return Figures(**result)

    def ask(self, table: str, case: str, arch: int) -> None:
        """Without waiting for the answer."""
        key = (table, case, arch)
        if key in self.results or key in self.asked:
            return
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(key) + "\n")
        self.process.stdin.flush()
        self.asked.append(key)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[str]:
        if self.folder is not None and not (self.folder / "triton" / "__init__.py").exists():
            raise FileNotFoundError(
                f"no Triton in {self.folder}: run `make test`, or say where with AOT_TRITON"
            )
        ours = [ROOT / name for name in ("tests", "server", "kernels", "models", "quantizers")]
        paths = [str(path) for path in ([self.folder] if self.folder else []) + ours]
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": self.scratch.name,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with (Path(self.scratch.name) / "errors").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "aot_compile"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            errors = (Path(self.scratch.name) / "errors").read_text()
            raise CompileError(f"the compiling process ended at {self.asked[0]}:\n{errors[-2000:]}")
        self.results[self.asked.pop(0)] = json.loads(line)


def cases(table: str) -> dict[str, Case]:
    """The cases of a module by name."""
    listed: list[Case] = importlib.import_module(table).CASES
    named = {case.name: case for case in listed}
    assert len(named) == len(listed), f"{table} names a case twice"
    return named
