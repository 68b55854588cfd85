"""Part 2: what the machine gives: read bandwidth, copy bandwidth, the gap between launches, its clocks.

    python benchmarks/gpu/ceilings.py

Every later share "of the read bandwidth" is of the figure that this part measures.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from clock import Chain, chain, copies, interleaved
from part import Part, begin, missing, parser
from rows import output, spread

TILES = ((4, 4), (8, 4), (8, 8), (16, 8))  # rows of 4 KiB a program, warps
SMALL = 9 << 20  # bytes of a small matrix: one where the ramp of a launch shows
LAUNCHES = 400
ROUNDS = 7
SUMMAND = 1 << 16  # so that no tile's sum overflows
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu"


def clocks() -> dict[str, str] | None:
    """What the driver reports just now, in its own units."""
    line = output("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return dict(zip(CLOCKS.split(","), line.split(", "), strict=True)) if line else None


def bandwidth(part: Part) -> None:
    """The best of a few tiles of a pure read, and a device copy (bytes read plus bytes written)."""
    from probes import WORDS, read

    words = 1 << 14 if part.dry else 1 << 29
    source = torch.randint(0, SUMMAND, (words // WORDS, WORDS), dtype=torch.int32, device=part.device)
    target, out = torch.empty_like(source), torch.empty(words // WORDS, dtype=torch.int32, device=part.device)
    subjects = {
        f"read {rows} rows {warps} warps": chain(
            [lambda rows=rows, warps=warps: read(source, out, rows=rows, warps=warps)], part.device
        )
        for rows, warps in TILES
    }
    subjects["copy"] = chain([lambda: target.copy_(source)], part.device)
    times = interleaved(subjects, 1 if part.dry else ROUNDS)
    rates = {
        name: [(2 if name == "copy" else 1) * 4 * words / us / 1e3 for us in samples]
        for name, samples in times.items()
    }
    rows = TILES[-1][0]  # whose sums the last of the reads has left
    expected = source.view(-1, rows * WORDS).sum(1)
    if not torch.equal(out[: len(expected)].long(), expected):
        raise ArithmeticError("the reading kernel did not read everything")
    best = max((n for n in rates if n != "copy"), key=lambda n: spread(rates[n])["median"])
    for subject, name in (("read", best), ("copy", "copy")):
        part.rows.write(subject=subject, how=name, bytes=4 * words, gb_per_s=spread(rates[name], 1))
        part.tell(f"{subject}: {spread(rates[name], 1)['median']:.0f} GB/s ({name})")


def launches(part: Part) -> None:
    """Microseconds a launch: of an empty kernel and a read of 9 MB, with overlapping launches and without."""
    from probes import WORDS, empty, read

    overlaps = (False,) if part.dry else (False, True)
    size = 4 * WORDS * 4 if part.dry else SMALL
    l2 = part.rows.facts["l2_bytes"]
    blocks = torch.randint(
        0, SUMMAND, (copies(size, l2), size // (4 * WORDS), WORDS), dtype=torch.int32, device=part.device
    )
    out = torch.empty(blocks.shape[1], dtype=torch.int32, device=part.device)
    subjects: dict[str, Chain] = {}
    for pdl in overlaps:
        name = " with overlap" if pdl else ""
        count = 4 if part.dry else LAUNCHES
        subjects[f"empty{name}"] = chain([lambda pdl=pdl: empty(out, pdl=pdl)] * count, part.device)
        reads = [lambda b=block, pdl=pdl: read(b, out, rows=4, warps=4, pdl=pdl) for block in blocks]
        subjects[f"read 9 MB{name}"] = chain(reads, part.device)
    for name, samples in interleaved(subjects, 1 if part.dry else ROUNDS).items():
        extra: dict[str, Any] = {}
        if name.startswith("read"):
            extra = {"bytes": size, "gb_per_s": spread([size / us / 1e3 for us in samples], 1)}
        part.rows.write(subject=name, us=spread(samples, 3), pdl=name.endswith("overlap"), **extra)
        part.tell(f"{name}: {spread(samples, 3)['median']:.2f} us a launch")


def main() -> int:
    part = begin("ceilings", parser(__doc__).parse_args())
    if missing("triton"):
        part.lacks("ceilings", "triton not installed")
        return 3
    idle = clocks()
    bandwidth(part)
    loaded = clocks()
    launches(part)
    part.rows.write(subject="clocks", idle=idle, after_load=loaded)
    part.say(f"clocks after load: {loaded}" if loaded else "clocks: nvidia-smi not found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
