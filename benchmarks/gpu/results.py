"""What the rows say of one device: of every part, the rows of the last run that measured something."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rows import NAME, Row, read

DEVICES = ("H100", "H200")
"""Devices that the tables show even before they were seen."""


@dataclass(frozen=True)
class Results:
    device: str
    rows: tuple[Row, ...]

    def part(self, name: str, **fields: object) -> list[Row]:
        return [r for r in self.rows if r["part"] == name and all(r.get(k) == v for k, v in fields.items())]

    def one(self, name: str, **fields: object) -> Row | None:
        """The last such row."""
        found = self.part(name, **fields)
        return found[-1] if found else None

    @property
    def bandwidth(self) -> float | None:
        """Measured read bandwidth, GB/s."""
        row = self.one("ceilings", subject="read")
        return row["gb_per_s"]["median"] if row else None

    def marked(self, name: str) -> str:
        """A footnote sign behind figures of a part that was measured behind no green gate."""
        return "" if all(r["gate"] == "green" for r in self.part(name)) else " †"


def load(folder: Path, dry: bool = False) -> list[Results]:
    """One for each of DEVICES and for every other device with rows."""
    rows = [r for r in read(folder / NAME) if bool(r.get("dry")) == dry and "lacks" not in r]
    names = [*DEVICES, *sorted({short(r["device"]) for r in rows} - set(DEVICES))]
    return [Results(name, tuple(_last([r for r in rows if short(r["device"]) == name]))) for name in names]


def short(device: str) -> str:
    """ "H100" of "NVIDIA H100 80GB HBM3"; other names as they are."""
    return next((name for name in DEVICES if name in device), device)


def _last(rows: list[Row]) -> Iterable[Row]:
    runs = {row["part"]: row["run"] for row in rows}  # the last one wins: rows lie in the order of time
    return (row for row in rows if row["run"] == runs[row["part"]])
