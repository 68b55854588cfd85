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

COLUMNS: Mapping[Phase, tuple[int, ...]] = {"decode": (16, 32, 64), "prefill": (16, 32, 64, 128)}
DEPTH = 512  # a part of K has at least so many inputs: below, starting costs more than it hides
PER_PROCESSOR = 4  # programs of 4 warps on a multiprocessor that keep enough loads under way


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

    The parts of K are the same for every batch, so that a row's sum is, too.
    """

    warps: int = 4
    split: int = 1
    unroll: int = 2
    stages: int = 1

    def tile(self, rows: int, phase: Phase) -> Tile:
        sizes = COLUMNS[phase]
        columns = next((c for c in sizes if rows <= c), sizes[-1])
        if columns > 64:  # twice the warps, or the sums would not fit into registers
            return Tile(max(self.warps, 8), columns, self.split, 1, self.stages)
        return Tile(self.warps, columns, self.split, self.unroll if columns == 16 else 1, self.stages)


@dataclass(frozen=True)
class Tuning:
    """Cuts measured on one kind of GPU, by "kind NxK phase"; anything else gets the default."""

    device: str = ""
    processors: int = 132
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    def cut(self, kind: str, outputs: int, inputs: int, phase: Phase) -> Cut:
        found = self.cuts.get(key(kind, outputs, inputs, phase))
        return found or default_cut(outputs, inputs, phase, self.processors)

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


def default_cut(outputs: int, inputs: int, phase: Phase, processors: int = 132) -> Cut:
    """For a GPU that was never tuned: enough programs to fill it, parts of K no shorter than DEPTH."""
    if phase == "prefill":
        return Cut(unroll=1)
    tiles = -(-outputs // Cut().tile(1, phase).outputs)
    split = 1
    while tiles * split < PER_PROCESSOR * processors and inputs // (2 * split) >= DEPTH:
        split *= 2
    return Cut(split=split)


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
            if tile.split > 1:
                partial = max(partial, blocks * tile.split * tile.outputs * tile.columns)
        return cls(
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )
