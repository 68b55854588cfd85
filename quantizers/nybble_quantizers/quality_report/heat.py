"""The heat strip: a square per linear, projections down, layers across, darker for more noise."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nybble_quantizers.quality_report.record import Record, Row
from nybble_quantizers.quality_report.wording import size

LEVELS = 8  # colours
WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 50.0)  # of a colour's range, dB
LABELS, ROW, TOP = 104, 20, 22  # pixels: row names, a row, layer numbers
SWATCH, PER_LINE = 86, 4  # of the legend
NARROWEST, WIDEST, SPAN = 8, 22, 660
EVERY = 5  # layers between numbers on top

_LAYER = re.compile(r"\.(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scale:
    """Signal over noise in dB, cut into ranges of one width; level 0 is the quietest."""

    low: float
    width: float
    count: int

    def level(self, db: float) -> int:
        return min(max(int((self.low + self.width * self.count - db) / self.width), 0), self.count - 1)

    def colour(self, level: int) -> int:
        return round(level * (LEVELS - 1) / (self.count - 1)) if self.count > 1 else LEVELS // 2

    def label(self, level: int) -> str:
        high = self.low + self.width * (self.count - level)
        return f"{high - self.width:g} to {high:g}"


@dataclass(frozen=True, slots=True)
class Cell:
    x: float
    y: float
    width: float
    colour: int | None  # None: not measured
    tip: str


@dataclass(frozen=True, slots=True)
class Swatch:
    x: float
    y: float
    colour: int
    label: str


@dataclass(frozen=True, slots=True)
class Heat:
    """What the template draws; `names` and `numbers` are of rows and layers, with y and x."""

    title: str
    description: str
    width: int
    height: int
    cell: float
    cells: tuple[Cell, ...]
    names: tuple[tuple[float, str], ...]
    numbers: tuple[tuple[float, int], ...]
    legend: tuple[Swatch, ...]


def decibels(row: Row, outputs: bool) -> float | None:
    return row.output_db if outputs else row.weight_db


def scale(values: Sequence[float]) -> Scale:
    """At most as many ranges as there are colours, of the least width that will do. At least one value."""
    for width in WIDTHS:
        low = math.floor(min(values) / width) * width
        count = math.floor((max(values) - low) / width) + 1
        if count <= LEVELS:
            break
    return Scale(low, width, min(count, LEVELS))


def heat(record: Record) -> Heat | None:
    """None where no error was measured."""
    known = [db for row in record.rows if (db := decibels(row, record.has_outputs)) is not None]
    if not known:
        return None
    ruler = scale(known)
    squares = _squares(record.rows)
    layers = sorted({layer for layer, _ in squares if layer is not None})
    names = list(dict.fromkeys(name for _, name in squares))
    cell = min(max(SPAN / max(len(layers), 1), NARROWEST), WIDEST)
    across = max(len(layers), 1) * cell
    cells = []
    for (layer, name), rows in squares.items():
        x, wide = (LABELS, across) if layer is None else (LABELS + layers.index(layer) * cell, cell)
        cells.append(_cell(x, TOP + ROW * names.index(name), wide, rows, record.has_outputs, ruler))
    bottom = TOP + ROW * len(names)
    legend = _legend(ruler, bottom)
    kind = "outputs" if record.has_outputs else "weights"
    return Heat(
        title=f"Signal over noise of the linears' {kind}, by layer",
        description=f"{len(record.rows)} linears, {len(layers)} layers; the noisiest: {min(known):.1f} dB.",
        width=int(LABELS + max(across, min(ruler.count, PER_LINE) * SWATCH)) + 2,
        height=int(legend[-1].y) + 22,
        cell=cell,
        cells=tuple(cells),
        names=tuple((TOP + ROW * i, _short(name, names)) for i, name in enumerate(names)),
        numbers=tuple((LABELS + (i + 0.5) * cell, layers[i]) for i in range(0, len(layers), EVERY)),
        legend=legend,
    )


def _legend(ruler: Scale, bottom: float) -> tuple[Swatch, ...]:
    return tuple(
        Swatch(
            LABELS + i % PER_LINE * SWATCH,
            bottom + 30 + 18 * (i // PER_LINE),
            ruler.colour(i),
            ruler.label(i),
        )
        for i in range(ruler.count)
    )


def _squares(rows: Sequence[Row]) -> dict[tuple[int | None, str], list[Row]]:
    """Linears by layer and row: the first number in a name counts layers, others (experts) share a square."""
    found: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        match = _LAYER.search(row.name)
        place: tuple[int | None, str] = (None, row.name)
        if match is not None:
            place = int(match[1]), re.sub(r"\.\d+\.", ".*.", row.name[match.end() :])
        found.setdefault(place, []).append(row)
    return found


def _cell(x: float, y: float, width: float, rows: list[Row], outputs: bool, ruler: Scale) -> Cell:
    """The noisiest of the rows that share the square decides."""
    known = [(db, row) for row in rows if (db := decibels(row, outputs)) is not None]
    if not known:
        return Cell(x, y, width, None, f"{rows[0].name}: not measured")
    db, row = min(known, key=lambda each: each[0])
    tip = f"{row.name}: {db:.1f} dB, {row.bits}-bit, {size(row.nbytes)}"
    return Cell(x, y, width, ruler.colour(ruler.level(db)), tip)


def _short(name: str, names: list[str]) -> str:
    """The last part where it says enough."""
    last = name.rpartition(".")[2]
    short = last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name
    return short if len(short) <= 16 else f"…{short[-15:]}"
