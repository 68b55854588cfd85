"""What ours is to reach beside the peers: ratios, since a host's bandwidth moves by a factor of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from comparison import Row

LIBRARY = {"llama.cpp Q4_1": 2.0, "llama.cpp Q4_0": 1.6}
RANDOM = 1.2  # to either file, where no cache helps
SERVER, STREAMS, BANDWIDTH = 2.0, 3.0, 0.8
TAIL, FIRST, START = 2.0, 1.0, 6.0
PEER = "llama.cpp"


@dataclass(frozen=True)
class Aim:
    who: str
    what: str
    value: float
    wanted: float
    most: bool = False  # whether `wanted` is the greatest value allowed

    @property
    def met(self) -> bool:
        return self.value <= self.wanted if self.most else self.value >= self.wanted

    def __str__(self) -> str:
        word = "at most" if self.most else "at least"
        verdict = "met" if self.met else "missed"
        return f"{self.who}: {self.what} {self.value:.2f} ({word} {self.wanted:g}): {verdict}"


def aims(rows: Sequence[Row], random: bool = False) -> Iterator[Aim]:
    """One for each of ours and each thing to reach that the rows tell. `random`: weights without text."""
    for own in (row for row in rows if row["peer"] == "nybble"):
        who = f"{own['subject']}, {own['way']}"
        beside = {
            row["subject"]: row["ours_to_this"][own["subject"]]
            for row in rows
            if row["peer"] == PEER and row["way"] == own["way"]
        }
        if own["way"] == "library":
            for name, ratios in beside.items():
                yield Aim(who, f"decode to {name}", ratios["decode"], RANDOM if random else LIBRARY[name])
            if random:
                yield Aim(who, "decode to the read bandwidth", own["of_read_bandwidth"], BANDWIDTH)
        else:
            yield from _served(who, own, list(beside.values()))


def _served(who: str, own: Row, beside: Sequence[dict[str, float]]) -> Iterator[Aim]:
    if beside:
        yield Aim(who, "decode to llama.cpp's fastest server", min(r["decode"] for r in beside), SERVER)
        first = max(r["first_token_ms"] for r in beside)
        yield Aim(who, "first token to llama.cpp's fastest server", first, FIRST, most=True)
    if median := own["gaps_ms"]["p50"]:  # 0: the pieces came together
        tail = own["gaps_ms"]["p99"] / median
        yield Aim(who, "99th percentile of gaps to their median", tail, TAIL, most=True)
    yield Aim(who, "8 streams to one", own["streams_of_one"], STREAMS)
    yield Aim(who, "seconds of the second start", own["once"]["start_s"], START, most=True)
