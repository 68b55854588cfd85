"""How a product is cut: by default, as measured on a GPU, and the workspace in which parts of K meet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["decode", "prefill"]

COLUMNS: Mapping[Phase, tuple[int, ...]] = {"decode": (16, 32, 64), "prefill": (128,)}
"""Rows of x in a tile. A prompt's chunk always takes the widest: its bits do not depend on how it is cut."""


@dataclass(frozen=True, slots=True)
class Tile:
    """`warps` · 16 outputs by `columns` rows of x; K in `split` parts; `unroll` steps at a time."""

    warps: int = 4
    columns: int = 16
    split: int = 1
    unroll: int = 2
    stages: int = 1

    @property
    def outputs(self) -> int:
        return 16 * self.warps


@dataclass(frozen=True, slots=True)
class Cut:
    """What was found best for one weight in one phase: a `Tile` but for its columns, which follow the batch.

    The parts of K are the same for every batch, so that a row's sum is, too. `single`: one row goes through
    `dp4a` and not through tensor cores (int8 by int8 only).
    """

    warps: int = 4
    split: int = 1
    unroll: int = 2
    stages: int = 1
    single: bool = False

    def tile(self, rows: int, phase: Phase) -> Tile:
        sizes = (1,) * self.single + COLUMNS[phase]
        columns = next((c for c in sizes if rows <= c), sizes[-1])
        return Tile(self.warps, columns, self.split, self.unroll if columns <= 16 else 1, self.stages)


@dataclass(frozen=True, slots=True)
class Habit:
    """How a kernel likes to be cut: inputs of a part of K at least, programs on a multiprocessor, stages, and
    whether one row goes through `dp4a`, which takes fewer instructions a weight than tensor cores do."""

    depth: int
    resident: int
    stages: int
    single: bool = False


HABITS = {
    "w4a16": Habit(512, 6, 1),
    "w8a16": Habit(512, 4, 1),
    "w8a8": Habit(1024, 3, 3, single=True),
    "fp8": Habit(1024, 3, 3),
    "f16": Habit(512, 3, 3),
}
"""Residents as the compiler's registers and shared memory allow (docs/kernels_aot.md); not measured yet."""


@dataclass(frozen=True)
class Tuning:
    """Cuts measured on one kind of GPU, by "kind NxK phase"; anything else gets the default."""

    device: str = ""
    processors: int = 132
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    def cut(self, kind: str, outputs: int, inputs: int, phase: Phase) -> Cut:
        found = self.cuts.get(key(kind, outputs, inputs, phase))
        return found or default_cut(kind, outputs, inputs, phase, self.processors)

    def as_json(self) -> dict[str, Any]:
        cuts = {
            name: {f: getattr(cut, f) for f in Cut.__dataclass_fields__}
            for name, cut in sorted(self.cuts.items())
        }
        return {"device": self.device, "processors": self.processors, "cuts": cuts}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Tuning:
        cuts = {name: Cut(**values) for name, values in found["cuts"].items()}
        return cls(found["device"], found["processors"], cuts)

    @classmethod
    def of_device(cls, device: torch.device, folder: Path | None = None) -> Tuning:
        """The file of this GPU's name in `folder`, else in the package, else defaults for its processors."""
        if device.type != "cuda":
            return cls("interpreter", 1)
        properties = torch.cuda.get_device_properties(device)
        name = file_name(properties.name)
        packaged = resources.files("nybble_kernels") / "tuned" / name
        for file in (packaged,) if folder is None else (folder / name, packaged):
            if file.is_file():
                return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        return cls(properties.name, properties.multi_processor_count)


def key(kind: str, outputs: int, inputs: int, phase: Phase) -> str:
    return f"{kind} {outputs}x{inputs} {phase}"


def file_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3.json"."""
    return "-".join(device.lower().split()) + ".json"


def default_cut(kind: str, outputs: int, inputs: int, phase: Phase, processors: int = 132) -> Cut:
    """For a GPU that was never tuned: as many parts of K as run at once, none too short to be worth it."""
    habit = HABITS[kind]
    if phase == "prefill":
        return Cut(warps=8, unroll=1, stages=habit.stages)  # sums of 128 rows on 4 warps do not fit
    tiles = -(-outputs // Cut().tile(1, phase).outputs)
    split = 1
    while tiles * split * 2 <= habit.resident * processors and inputs >= 2 * split * habit.depth:
        split *= 2
    return Cut(split=split, stages=habit.stages, single=habit.single)


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """partial: float32, the sums of parts · counters: int32 zeros, left zero by every launch."""

    partial: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, uses: Iterable[tuple[Tile, int, int]], device: torch.device) -> Workspace:
        """Room for the largest of the (tile, outputs, rows) that will be launched."""
        partial = counters = 1
        for tile, outputs, rows in uses:
            blocks = -(-outputs // tile.outputs) * -(-rows // tile.columns)
            counters = max(counters, blocks)
            if tile.split > 1 or tile.columns <= 64:
                partial = max(partial, blocks * tile.split * tile.outputs * max(tile.columns, 16))
        return cls(
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )
