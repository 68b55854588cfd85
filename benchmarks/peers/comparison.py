"""From rounds to rows: medians, ranges, the ratios of ours to a peer, and the table that people read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measuring import Found
from subjects import Subject

from nybble.bench.summary import quantile


@dataclass(frozen=True)
class Metric:
    title: str
    digits: int
    falls: bool = False  # whether less is better


METRICS: Mapping[str, Metric] = {
    "decode": Metric("tokens/s", 1),
    "gap_ms": Metric("gap ms", 2, True),
    "gap_p99_ms": Metric("p99 ms", 2, True),
    "first_token_ms": Metric("first ms", 0, True),
    "prefill": Metric("prefill/s", 0),
    "streams": Metric("8 streams", 0),
    "start_s": Metric("start s", 2, True),
    "peak_mib": Metric("peak MiB", 0, True),
}
"""Rates are tokens a second; `first_token_ms` and `prefill` are of the long prompt, gaps between tokens."""

Row = dict[str, Any]
Results = Mapping[Subject, Found]


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' own ratios, so that what changes from round to round cancels."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def row(subject: Subject, found: Found, results: Results, bandwidth: Sequence[float]) -> Row:
    """What is kept of one subject. `bandwidth`: bytes a second, of each round."""
    made: Row = {
        "subject": subject.name,
        "way": subject.way,
        "peer": subject.peer,
        "file": subject.file.rstrip("/").rpartition("/")[2],
        "setting": found.setting,
        "facts": found.facts,
        "figures": {m: spread(values, METRICS[m].digits + 1) for m, values in found.rounds.items()},
        "once": {m: round(value, METRICS[m].digits + 1) for m, value in found.once.items()},
        "rounds": {
            m: [round(v, METRICS[m].digits + 1) for v in values] for m, values in found.rounds.items()
        },
        "text": found.text,
    }
    if found.gaps:
        gaps = {name: round(1e3 * quantile(found.gaps, q), 3) for name, q in (("p50", 0.5), ("p99", 0.99))}
        made["gaps_ms"] = gaps | {"count": len(found.gaps)}
    if "streams" in found.rounds:
        made["streams_of_one"] = ratio(found.rounds["streams"], found.rounds["decode"])
    if size := found.facts.get("step_bytes"):
        rates = [rate * size for rate in found.rounds["decode"]]
        made["of_read_bandwidth"] = ratio(rates, bandwidth)
    made["ours_to_this"] = {
        other.name: compared(mine, found)
        for other, mine in results.items()
        if other.peer == "nybble" and other.way == subject.way and other != subject
    }
    return made


def compared(mine: Found, theirs: Found) -> dict[str, float]:
    """Ours divided by theirs, metric by metric."""
    of_rounds = {m: ratio(mine.rounds[m], theirs.rounds[m]) for m in theirs.rounds if m in mine.rounds}
    return of_rounds | {m: round(mine.once[m] / theirs.once[m], 3) for m in theirs.once if m in mine.once}


def table(rows: Sequence[Row]) -> list[str]:
    """Medians with their ranges; then how many times as much ours has, of each peer."""
    lines = []
    for way in ("library", "server"):
        found = [each for each in rows if each["way"] == way]
        shown = [m for m in METRICS if any(m in each["figures"] or m in each["once"] for each in found)]
        if found:
            lines += aligned(
                [[way, *(METRICS[m].title for m in shown)], *(cells(each, shown) for each in found)]
            )
        for each in found:
            lines += [f"  {name} to {each['subject']}: {told(ratios)}" for name, ratios in _by_ours(each)]
        lines += [""] if found else []
    return lines


def _by_ours(row: Row) -> list[tuple[str, dict[str, float]]]:
    return list(row["ours_to_this"].items()) if row["peer"] != "nybble" else []


def told(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{METRICS[m].title} {value:.2f} x" for m, value in ratios.items())


def cells(row: Row, metrics: Sequence[str]) -> list[str]:
    made = [row["subject"]]
    for metric in metrics:
        digits = METRICS[metric].digits
        if metric in row["figures"]:
            found = row["figures"][metric]
            made.append("{median:.{d}f} ({min:.{d}f}-{max:.{d}f})".format(**found, d=digits))
        elif metric in row["once"]:
            made.append(f"{row['once'][metric]:.{digits}f}")
        else:
            made.append("-")
    return made


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
