"""Quality against size: a point per checkpoint, the best of them joined by a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nybble_quantizers.quality_report.axis import Axis, axis
from nybble_quantizers.quality_report.record import Record
from nybble_quantizers.quality_report.wording import label, method

MARKS = (
    "M6 0A6 6 0 1 1-6 0 6 6 0 1 1 6 0Z",  # disc
    "M-5.5-5.5H5.5V5.5H-5.5Z",  # square
    "M0-7.5 7 5.5H-7Z",  # triangle
    "M0-7.5 7.5 0 0 7.5-7.5 0Z",  # diamond
    "M0 7.5-7-5.5H7Z",  # triangle on its tip
    "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",  # cross
)
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 46  # pixels around the plot
GLYPH, LINE = 6.6, 15  # of a label: pixels a character, pixels high
LONGEST = 26  # characters of a label

Pixel = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """What the vertical axis shows, in the unit of its title."""

    title: str
    value: Callable[[Record], float | None]
    interval: Callable[[Record], tuple[float, float] | None] = lambda record: None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


MEASURES = (
    Measure(
        "KL divergence, nats a token",
        lambda record: record.evaluation.kl_divergence,
        lambda record: record.evaluation.kl_interval,
    ),
    Measure("rise of the perplexity, %", lambda record: _percent(record.evaluation.rise)),
    Measure("mean noise of the linears' outputs, %", lambda record: _percent(record.output_noise)),
    Measure("mean noise of the weights, %", lambda record: _percent(record.weight_noise)),
)


@dataclass(frozen=True, slots=True)
class Point:
    """`whisker` is the interval from its low end to its high one, y; the label may have found no room."""

    x: float
    y: float
    kind: int
    tip: str
    whisker: tuple[float, float] | None
    label: str | None
    label_at: Pixel
    anchor: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """What the template draws, in pixels. `kinds` are the methods, in the order of their marks."""

    width: int
    height: int
    measure: Measure
    unit: str
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    points: tuple[Point, ...]
    frontier: tuple[Pixel, ...]
    kinds: tuple[str, ...]
    left_out: tuple[str, ...]


def measure_of(records: Sequence[Record]) -> Measure | None:
    """The first that two checkpoints have, else the first that one has."""
    for enough in (2, 1):
        for measure in MEASURES:
            if sum(measure.value(record) is not None for record in records) >= enough:
                return measure
    return None


def scatter(records: Sequence[Record], width: int = 720, height: int = 420) -> Scatter | None:
    """None where nothing was measured."""
    measure = measure_of(records)
    if measure is None:
        return None
    shown = [(record, value) for record in records if (value := measure.value(record)) is not None]
    unit, scale = ("GB", 1e9) if max(record.nbytes for record in records) >= 2e9 else ("MB", 1e6)
    ends = [end for record, _ in shown for end in measure.interval(record) or ()]
    across = axis([record.nbytes / scale for record, _ in shown])
    up = axis([*(value for _, value in shown), *ends], zero=True, logarithmic=True)
    frame = _Frame(width, height, across, up)
    spots = [(frame.x(record.nbytes / scale), frame.y(value)) for record, value in shown]
    kinds = tuple(dict.fromkeys(method(record) for record, _ in shown))
    points = _points([record for record, _ in shown], spots, frame, measure, kinds)
    return Scatter(
        width=width,
        height=height,
        measure=measure,
        unit=unit,
        across=tuple((frame.x(tick), f"{tick:g}") for tick in across.ticks),
        up=tuple((frame.y(tick), f"{tick:g}") for tick in up.ticks),
        points=tuple(points),
        frontier=_frontier(spots),
        kinds=kinds,
        left_out=tuple(record.name for record in records if measure.value(record) is None),
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    width: int
    height: int
    across: Axis
    up: Axis

    def x(self, value: float) -> float:
        return round(LEFT + self.across.at(value) * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(self.height - BOTTOM - self.up.at(value) * (self.height - TOP - BOTTOM), 1)


def _frontier(spots: Sequence[Pixel]) -> tuple[Pixel, ...]:
    """Those that no other point beats in both size and quality, from the smallest on."""
    best: list[Pixel] = []
    for x, y in sorted(spots, key=lambda spot: (spot[0], -spot[1])):
        if not best or y > best[-1][1]:  # pixels grow downwards
            best.append((x, y))
    return tuple(best)


def _points(
    records: Sequence[Record], spots: Sequence[Pixel], frame: _Frame, measure: Measure, kinds: Sequence[str]
) -> list[Point]:
    labels = [label(record) for record in records]
    if len(set(labels)) < len(labels):
        labels = [record.name for record in records]
    taken: list[Box] = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    points = []
    for record, name, (x, y) in zip(records, labels, spots, strict=True):
        shown = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"
        where = _room(x, y, GLYPH * len(shown), frame.width, frame.height, taken)
        ends = measure.interval(record)
        points.append(
            Point(
                x=x,
                y=y,
                kind=kinds.index(method(record)) % len(MARKS),
                tip=f"{record.name}: {measure.value(record):.4g}, {record.nbytes / 1e6:,.1f} MB",
                whisker=None if ends is None else (frame.y(ends[0]), frame.y(ends[1])),
                label=None if where is None else shown,
                label_at=(x, y) if where is None else where[0],
                anchor="start" if where is None else where[1],
            )
        )
    return points


def _room(
    x: float, y: float, wide: float, width: int, height: int, taken: list[Box]
) -> tuple[Pixel, str] | None:
    """Where a label fits: right of its point, left, above, below; takes the place."""
    offers: tuple[tuple[Pixel, str, float], ...] = (
        ((x + 12, y + 4.5), "start", x + 12),
        ((x - 12, y + 4.5), "end", x - 12 - wide),
        ((x, y - 13), "middle", x - wide / 2),
        ((x, y + 22), "middle", x - wide / 2),
    )
    for at, anchor, left in offers:
        box = (left, at[1] - LINE + 3, left + wide, at[1] + 3)
        inside = (
            box[0] >= LEFT + 2 and box[2] <= width - 2 and box[1] >= TOP - 8 and box[3] <= height - BOTTOM
        )
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return at, anchor
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
