"""The roofline of the linears as an SVG: attainable TFLOP/s by operations per byte, and what was measured.

The roofs are the measured read bandwidth where there is one, else the datasheet's, and the datasheet's dense
matrix rates (H100 SXM: 3.35 TB/s, 989 TFLOP/s bfloat16, 1979 TOP/s int8; H200: 4.8 TB/s, the same rates).
Colours are read on light and dark pages alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from results import Results
from rows import Row

SHEET = {"H100": 3.35, "H200": 4.8}  # TB/s
MATRIX = {"bfloat16": 989.0, "int8": 1979.0}  # TFLOP/s and TOP/s, dense
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 860, 480, 70, 60, 40, 20
X = (0.5, 8192.0)  # operations a byte
Y = (0.5, 4096.0)  # TFLOP/s
TEXT, GRID = "#808080", "#80808040"
ROOFS = {"H100": "#3b82c4", "H200": "#2f9e6e"}
MARKS = {"W4A16": "#d9772b", "W8A8": "#a25ddc", "fp8": "#c2528b", "16-bit": "#8a8f98"}


def x_of(value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / X[0]) / math.log(X[1] / X[0])


def y_of(value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.log(value / Y[0]) / math.log(Y[1] / Y[0])


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = TEXT, size: int = 12) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'


def line(points: list[tuple[float, float]], colour: str, extra: str = "") -> str:
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" {extra}/>'


def axes() -> Iterator[str]:
    for power in range(0, 14, 2):
        at = x_of(2.0**power)
        yield line([(2.0**power, Y[0]), (2.0**power, Y[1])], GRID)
        yield text(at, HEIGHT - BOTTOM + 18, str(2**power), "middle")
    for power in range(0, 13, 2):
        yield line([(X[0], 2.0**power), (X[1], 2.0**power)], GRID)
        yield text(LEFT - 8, y_of(2.0**power) + 4, str(2**power), "end")
    yield text((LEFT + WIDTH) / 2, HEIGHT - 18, "operations per byte moved", "middle")
    yield text(LEFT - 50, TOP - 16, "TFLOP/s (TOP/s for 8 bits)")


def roofs(devices: list[Results]) -> Iterator[str]:
    for index, found in enumerate(d for d in devices if d.device in SHEET):
        rate = found.bandwidth / 1e3 if found.bandwidth else SHEET[found.device]
        source = "measured" if found.bandwidth else "datasheet"
        colour = ROOFS[found.device]
        knee = MATRIX["int8"] / rate
        yield line([(X[0], X[0] * rate), (knee, MATRIX["int8"])], colour)
        words = f"{found.device}: {rate:.2f} TB/s, {source}"
        yield text(LEFT + 12, TOP + 16 * (index + 1), words, colour=colour)
    for kind, rate in MATRIX.items():
        yield line([(rate / max(SHEET.values()), rate), (X[1], rate)], TEXT, 'stroke-dasharray="4 3"')
        yield text(WIDTH - RIGHT - 4, y_of(rate) - 5, f"{kind}, {rate:.0f} dense", "end")


def points(found: Results) -> Iterator[str]:
    """Ours filled, the fastest peer of each case hollow."""
    for row in found.part("linears"):
        beside = found.part("linears", model=row["model"], projection=row["projection"], m=row["m"])
        peers = [r["us"]["median"] for r in beside if not r["ours"] and r["kind"] == row["kind"]]
        if row["ours"] or row["us"]["median"] == min(peers, default=None):
            yield point(row)


def point(row: Row) -> str:
    outputs, inputs = row["shape"]
    work = 2.0 * row["m"] * outputs * inputs
    x, y = work / row["bytes"], work / row["us"]["median"] / 1e6
    colour = MARKS.get(row["kind"], TEXT)
    fill = f'fill="{colour}"' if row["ours"] else f'fill="none" stroke="{colour}"'
    name = f"{row['subject']}, {row['model']} {row['projection']}, M = {row['m']}: {y:.1f}"
    inside = min(max(x, X[0]), X[1]), min(max(y, Y[0]), Y[1])
    title = f"<title>{name}</title>"
    return f'<circle cx="{x_of(inside[0]):.1f}" cy="{y_of(inside[1]):.1f}" r="3" {fill}>{title}</circle>'


def legend(measured: bool) -> Iterator[str]:
    x, y = WIDTH - RIGHT - 250, HEIGHT - BOTTOM - 16 * (len(MARKS) + 1)
    for index, (kind, colour) in enumerate(MARKS.items()):
        yield f'<circle cx="{x}" cy="{y + 16 * index}" r="4" fill="{colour}"/>'
        yield text(x + 10, y + 16 * index + 4, kind)
    note = "filled: nybble; hollow: the fastest peer" if measured else "no kernel measured yet: bounds only"
    yield text(x - 4, y + 16 * len(MARKS) + 4, note)


def svg(devices: list[Results]) -> str:
    marks = [each for found in devices for each in points(found)]
    body = "\n".join([*axes(), *roofs(devices), *marks, *legend(bool(marks))])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return f"{head}\n<title>Roofline of the linears</title>\n{body}\n</svg>\n"
