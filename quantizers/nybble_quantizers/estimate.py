"""What a run will need, from shapes alone: memory by part, disk, and time. Nothing is loaded for it.

Every part of memory is a sum over tensors that are there at the same time; the numbers of copies were counted
in the code and compared with the largest resident size of runs on made models: `tests/quantizers/
test_estimate.py` lets what is said be 35 % too little and 60 % too much. Times are operations over a rate
that is measured for half a second, and costs per weight that were measured: see the constants.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble_models.errors import ModelError
from nybble_models.loader import CPU
from nybble_models.spec import ModelSpec
from nybble_quantizers.gptq import ROWS
from nybble_quantizers.output import SHARD_BYTES
from nybble_quantizers.scheme import Scheme
from nybble_quantizers.selection import Selection
from nybble_quantizers.stream import KEPT, TOGETHER, told

FLOAT = 4  # bytes
WARM = 96 << 20  # what libraries take once they compute, beyond what they take when loaded
NUMBA = 104 << 20  # with the loops of GPTQ
TRIES = 16  # candidates for a fold: every fourth of the grid in two kinds, then the best one's neighbours
TEXT_SLOW = 6  # times slower than a large product: tokens are written eight at a time (SmolLM2-135M, 64 s)
PLAIN_COST = 0.06e-6  # seconds a weight to round to nearest, pack and report it (made model, 45 M weights)
AWQ_COST = 0.40e-6  # to round candidates and search ranges (SmolLM2-135M, 4 bits in groups of 64)
GPTQ_COST = 0.35e-6  # to round one input after another and sweep twice (the same)
FACTOR_WORK = 4  # K³ operations of a factorisation in float64, in terms of float32 ones (K = 1536)


@dataclass(frozen=True, slots=True)
class Estimate:
    """memory: bytes by part in the `stage` that needs most · spilled: the text's states are kept in files ·
    journal: bytes beside the output while the run lasts · seconds: by stage.
    """

    parameters: int
    linears: int
    bits: float
    written: int
    journal: int
    stage: str
    memory: Mapping[str, int]
    spilled: bool
    seconds: Mapping[str, float]

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def disk(self) -> int:
        return self.written + self.journal

    def check(self, budget: int) -> None:
        """Raises `ModelError` naming the largest part when even files for the states do not help."""
        if self.needed <= budget:
            return
        part, most = max(self.memory.items(), key=lambda row: row[1])
        raise ModelError(
            f"about {_mib(self.needed)} of memory are needed, {_mib(most)} of them for {part}; "
            f"{_mib(budget)} may be used",
            hint=HINTS.get(self.stage, "give more memory, or calibrate on fewer or shorter windows"),
        )


HINTS = {
    "calibrate": "--calibration FILE takes a text instead of having the whole model write one",
    "choose": "give more memory, or a method and bits without a target",
    "tune": "--quality best holds the whole model: leave it out, or give more memory",
}


def estimate(
    spec: ModelSpec,
    scheme: Scheme,
    selection: Selection,
    *,
    given: bool,
    budget: int | None,
    rate: float = 0.0,
    device: torch.device = CPU,
) -> Estimate:
    """`given`: the calibration text is a file · budget: bytes, None for no limit · rate: see `measured_rate`;
    0 leaves the times out · device: whose memory it is about."""
    work = _Work(spec, scheme, given, selection.nbytes, device)
    stages = work.stages(spilled=False)
    spilled = budget is not None and max(sum(parts.values()) for parts in stages.values()) > budget
    if spilled:
        stages = work.stages(spilled=True)
    stage = max(stages, key=lambda name: sum(stages[name].values()))
    journal = selection.nbytes + 2 * FLOAT * work.states
    if spilled:
        journal += FLOAT * (work.states + work.held)
    if scheme.best:
        journal += FLOAT * work.block * spec.num_layers + selection.nbytes
    return Estimate(
        parameters=spec.parameters,
        linears=sum(map(len, selection.forms)),
        bits=8 * selection.nbytes / spec.parameters,
        written=selection.nbytes,
        journal=journal,
        stage=stage,
        memory=stages[stage],
        spilled=spilled,
        seconds=work.seconds(rate) if rate else {},
    )


class _Work:
    """Counts of one run. Sizes are in numbers, not bytes, unless they say so."""

    def __init__(
        self, spec: ModelSpec, scheme: Scheme, given: bool, written: int, device: torch.device
    ) -> None:
        self.spec = spec
        self.written = written
        self.scheme = scheme
        self.given = given
        self.threads = torch.get_num_threads() if device == CPU else 1
        self.on_cpu = device == CPU
        self.program = WARM + (resident() if self.on_cpu else 0)
        self.shapes = {p: spec.shape(p) for p in spec.projections}
        self.block = sum(math.prod(shape) for shape in self.shapes.values())
        self.wide = max(inputs for _, inputs in self.shapes.values())
        self.grams = sum(self.shapes[p][1] ** 2 for p in ("q", "o", spec.mlp[0], "down"))
        self.length = min(scheme.length, spec.max_positions)
        self.windows = scheme.samples if scheme.reads else 0
        self.text = self.windows * self.length
        passing = told(scheme, self.windows, self.length, self.spec.hidden_size) if scheme.watches else 0
        self.passing = passing * self.length
        self.states = (self.text + self.passing) * spec.hidden_size if scheme.watches else 0
        self.held = self.text * self.wide if scheme.compensates else 0
        self.table = spec.vocab_size * spec.hidden_size

    def stages(self, spilled: bool) -> dict[str, dict[str, int]]:
        found = {"quantize": self._quantize(spilled), "write": self._write()}
        if self.scheme.reads and not self.given:
            found["calibrate"] = self._calibrate()
        if self.scheme.mixes:
            found["choose"] = self._choose()
        if self.scheme.best:
            found["tune"] = self._tune()
        return {name: {"the program": self.program} | parts for name, parts in found.items()}

    def _quantize(self, spilled: bool) -> dict[str, int]:
        scheme, largest = self.scheme, max(map(math.prod, self.shapes.values()))
        parts = {"one block": FLOAT * self.block + 2 * self.block}
        flying = min(self.threads, max(self.windows, 1)) * self.length
        inner = 2 * self.wide + 4 * self.spec.hidden_size
        if scheme.compensates:
            parts["one block"] += FLOAT * self.block + self.block
            rows = min(ROWS * self.threads if self.on_cpu else largest, largest // self.wide)
            parts["compiled loops"] = NUMBA if self.on_cpu else 0
            parts["a Hessian and its factor"] = 44 * self.wide**2
            parts["rounding"] = FLOAT * (3 * largest + 7 * rows * self.wide)
            parts["windows on their way"] = FLOAT * (flying * inner + TOGETHER * self.length * self.wide)
        elif scheme.watches:
            parts["one block"] += FLOAT * self.block
            parts["sums over inputs"] = FLOAT * (self.grams + self.wide**2)
            parts["candidates"] = FLOAT * self.threads * 4 * largest
            together = min(TOGETHER, self.windows) * self.length
            parts["windows on their way"] = FLOAT * (
                flying * inner + (together + KEPT * self.length) * (3 * self.spec.hidden_size + self.wide)
            )
        else:
            parts["rounding"] = FLOAT * 4 * largest
        if scheme.folds and scheme.compensates:
            parts["sums over inputs"] = FLOAT * self.grams
        if scheme.watches:
            parts["the text's states"] = 0 if spilled else FLOAT * (self.states + self.held)
        return parts

    def _write(self) -> dict[str, int]:
        return {"embedding and head": FLOAT * self.table * 2, "a shard": min(SHARD_BYTES, self.written)}

    def _calibrate(self) -> dict[str, int]:
        keys = 2 * self.spec.num_layers * self.text * self.spec.num_kv_heads * self.spec.head_dim
        return {"the whole model, to write the text": FLOAT * self.spec.parameters, "keys": FLOAT * keys}

    def _choose(self) -> dict[str, int]:
        from nybble_quantizers.choosing import WINDOWS

        states = (self.spec.num_layers + 1) * min(WINDOWS, self.windows) * self.length * self.spec.hidden_size
        gradients = self.block * (2 + len(self.scheme.widths) + 2 * self.threads)
        spec, side_by_side = self.spec, min(self.threads, WINDOWS) * self.length
        seen = 10 * spec.hidden_size + 5 * self.wide + 3 * spec.num_heads * self.length
        return {
            "one block, gradients and candidates": FLOAT * gradients,
            "what gradients are made of": FLOAT * side_by_side * seen,
            "states before all blocks": FLOAT * states,
            "embedding and head": FLOAT * self.table * 2,
        }

    def _tune(self) -> dict[str, int]:
        from nybble_quantizers.distill import END_TO_END

        spec, together = self.spec, min(END_TO_END.batch, self.windows) * self.length
        kept = (spec.num_layers + 1) * together * spec.hidden_size
        return {
            "the whole model": FLOAT * 2 * self.block * spec.num_layers,
            "embedding and head": FLOAT * self.table * 2,
            "states and what they are to be": FLOAT * 2 * self.text * spec.hidden_size,
            "states before all blocks": FLOAT * kept,
            "predictions": FLOAT * 5 * min(self.threads, self.windows) * self.length * spec.vocab_size,
        }

    def seconds(self, rate: float) -> dict[str, float]:
        """By stage, from operations and from costs per weight. rate: operations a second of one thread."""
        spec, scheme, layers = self.spec, self.scheme, self.spec.num_layers
        weights, attention = self.block * layers, 4 * self.length * spec.num_heads * spec.head_dim
        through = 2 * self.block + attention  # operations of a token in a block
        found = {"write": PLAIN_COST * spec.parameters}
        work, cost = 0.0, PLAIN_COST * weights
        if scheme.watches and (scheme.folds or not scheme.compensates):
            work += self.text * (through + self.grams)
        if scheme.folds:
            products = sum(math.prod(self.shapes[p]) * self.shapes[p][1] for p in ("o", "down"))
            work += TRIES * (KEPT * self.length * through + 2 * products)
            cost += AWQ_COST * weights
        if scheme.compensates:
            lacking = sum(2 * spec.hidden_size * self.shapes[p][1] for p in ("q", "o", spec.mlp[0], "down"))
            work += self.text * (through + self.grams) + self.passing * (through + lacking)
            work += FACTOR_WORK * sum(self.shapes[p][1] ** 3 for p in ("q", "o", spec.mlp[0], "down"))
            cost += GPTQ_COST * weights
        found["quantize"] = (work * layers / rate + cost) / self.threads
        if scheme.reads and not self.given:
            found["calibrate"] = 2 * spec.parameters * self.text * TEXT_SLOW / rate / self.threads
        if scheme.mixes:
            found["choose"] = (
                4 * through * 4 * self.length * layers / rate + 4 * PLAIN_COST * weights
            ) / self.threads
        if scheme.best:
            found["tune"] = scheme.steps * 8 * self.length * 4 * through * layers / rate / self.threads
        return found


def resident() -> int:
    """Bytes of this process that are in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 300 << 20


def measured_rate(seconds: float = 0.5) -> float:
    """Operations a second of one thread in products of the size that quantizing makes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, weight = torch.ones(512, 1024), torch.ones(1024, 1024)
        done, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            torch.mm(x, weight)
            done += 1
        return 2 * x.numel() * len(weight) * done / passed
    finally:
        torch.set_num_threads(threads)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
