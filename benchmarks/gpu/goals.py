"""The goals, as data: what is measured, and from which value on it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from results import Results

NO_ROWS = "not yet measured"
SMALL = (1, 2, 4, 8, 16)
Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    text: str
    unit: str
    least: Mapping[str, float]  # by device
    measure: Measure
    digits: int = 0


def decode_rate(kind: str, overlaps: tuple[bool, ...]) -> Measure:
    """Tokens per second of Llama-2-7B at batch 1 and context 0, the best of the ways to launch."""

    def measure(found: Results) -> float | None:
        rows = found.part("steps", phase="decode", model="Llama-2-7B", kind=kind, context=0, batch=1)
        rates = [row["tokens_per_s"]["median"] for row in rows if row["overlap"] in overlaps]
        return max(rates, default=None)

    return measure


def kernel_rate(projection: str) -> Measure:
    """TB/s of the W4A16 kernel at Llama-2-7B's matrix and one row."""

    def measure(found: Results) -> float | None:
        rows = found.part("linears", model="Llama-2-7B", projection=projection, m=1, kind="W4A16", ours=True)
        return max((r["gb_per_s"]["median"] / 1e3 for r in rows), default=None)

    return measure


def against_peers(kind: str, peers: tuple[str, ...]) -> Measure:
    """How much faster ours is than the fastest peer of these kinds, at the worst shape and small batch."""

    def measure(found: Results) -> float | None:
        ratios = []
        for row in found.part("linears", kind=kind, ours=True):
            case = {key: row[key] for key in ("model", "projection", "m")}
            beside = [r for r in found.part("linears", **case) if not r["ours"] and r["kind"] in peers]
            if row["m"] in SMALL and beside:
                fastest = min(r["us"]["median"] for r in beside)
                ours = min(r["us"]["median"] for r in found.part("linears", kind=kind, ours=True, **case))
                ratios.append(fastest / ours)
        return min(ratios, default=None)

    return measure


def against_cublas(found: Results) -> float | None:
    """cuBLAS bfloat16's time over ours, at the worst shape and batch of 512 and more."""
    ratios = []
    for row in found.part("linears", subject="cuBLAS bfloat16"):
        case = {key: row[key] for key in ("model", "projection", "m")}
        ours = [r["us"]["median"] for r in found.part("linears", kind="W4A16", ours=True, **case)]
        if row["m"] >= 512 and ours:
            ratios.append(row["us"]["median"] / min(ours))
    return min(ratios, default=None)


def http_share(found: Results) -> float | None:
    row = found.one("over_http")
    return row["of_in_process"]["median"] if row else None


BOTH = {"H100": 1.0, "H200": 1.0}
GOALS = (
    Goal(
        "Llama-2-7B W4A16, batch 1, context 0",
        "tokens/s",
        {"H100": 610, "H200": 790},
        decode_rate("W4A16", (False,)),
    ),
    Goal(
        "the same with overlapping launches",
        "tokens/s",
        {"H100": 700, "H200": 950},
        decode_rate("W4A16", (True,)),
    ),
    Goal(
        "Llama-2-7B W8A8, batch 1, context 0",
        "tokens/s",
        {"H100": 400, "H200": 560},
        decode_rate("W8A8", (False, True)),
    ),
    Goal("gate/up kernel, W4A16, M = 1", "TB/s", {"H100": 2.4}, kernel_rate("gate_up"), 2),
    Goal("o kernel, W4A16, M = 1", "TB/s", {"H100": 2.0}, kernel_rate("o"), 2),
    Goal(
        "W4A16 over the fastest peer, worst shape, M = 1 to 16",
        "x",
        BOTH,
        against_peers("W4A16", ("W4A16", "W8A8", "fp8", "16-bit")),
        2,
    ),
    Goal(
        "W8A8 over the fastest 8-bit peer, worst shape, M = 1 to 16",
        "x",
        BOTH,
        against_peers("W8A8", ("W8A8", "fp8")),
        2,
    ),
    Goal(
        "W4A16 over cuBLAS bfloat16, worst shape, M >= 512",
        "x",
        {"H100": 0.8, "H200": 0.8},
        against_cublas,
        2,
    ),
    Goal("rate over HTTP, of the rate in process", "x", {"H100": 0.97, "H200": 0.97}, http_share, 3),
)


def verdicts(devices: list[Results]) -> list[tuple[str, ...]]:
    """(goal, device, target, measured, met) of every goal and device."""
    return [
        (goal.text, found.device, f"{goal.least[found.device]:g} {goal.unit}", *_verdict(goal, found))
        for goal in GOALS
        for found in devices
        if found.device in goal.least
    ]


def _verdict(goal: Goal, found: Results) -> tuple[str, str]:
    value = goal.measure(found)
    if value is None:
        return NO_ROWS, ""
    mark = "".join({found.marked("linears"), found.marked("steps")})
    return f"{value:.{goal.digits}f} {goal.unit}{mark}", "yes" if value >= goal.least[found.device] else "no"
