"""What the compiler makes of every Triton kernel, on a machine without a GPU: registers, loads, instructions.

    python benchmarks/aot.py                              with the installed Triton
    python benchmarks/aot.py --triton .venv/triton-3.6    with another one, unpacked in a folder
    python benchmarks/aot.py --only w4a16 --arch 90       some of the cases, one architecture
    python benchmarks/aot.py --markdown > docs/kernels_aot.md

The cases and their limits are `tests/aot_cases.py`; `make test` holds the kernels to them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support_aot import ARCHS, DEVICE_TRITON, Case, CompileError, Compiler, Figures, breaches, cases  # noqa: E402

TABLE = "aot_cases"
HEADINGS = {
    "case": "case",
    "sm": "architecture",
    "registers": "registers a thread",
    "shared": "shared memory a program, bytes",
    "programs": "programs that a multiprocessor holds at once, by registers, warps and shared memory",
    "loop": "instructions in the hot loop: the one that reads the weights or the cache",
    "/weight": "of them per weight, or per number of the cache",
    "tensor cores": "matrix instructions in the kernel",
    "loads": "width in bytes of the loads of weights or cache x how many stand in the code",
    "early": "of them, or prefetches, before the wait of a chained launch",
}


def row(case: str, arch: int, figures: Figures) -> list[str]:
    def several(counts: dict[str, int]) -> str:
        return " ".join(f"{name}x{n}" for name, n in counts.items())

    per_weight = figures.per_weight
    return [
        case,
        str(arch),
        str(figures.registers),
        str(figures.shared),
        str(figures.resident),
        str(figures.hot),
        "" if per_weight is None else f"{per_weight:.2f}",
        several(figures.matmuls),
        several(figures.streamed),
        str(figures.early) if figures.chained else "",
    ]


def rows(compiler: Compiler, chosen: Sequence[Case], archs: Sequence[int]) -> Iterator[list[str]]:
    """One per case and architecture; what breaks a limit goes to the errors."""
    wanted = [(case, arch) for case in chosen for arch in case.archs if arch in archs]
    for case, arch in wanted:
        try:
            figures = compiler.figures(TABLE, case.name, arch)
        except CompileError as error:
            print(f"{case.name} sm_{arch}: {error}", file=sys.stderr)
            continue
        for breach in breaches(figures, case.limits_on(arch)):
            print(f"{case.name} sm_{arch}: {breach}", file=sys.stderr)
        yield row(case.name, arch, figures)


def markdown(version: str, table: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "# What the compiler makes of the Triton kernels\n"
    yield f"Compiled with Triton {version}, not run: no figure here is a speed. `make test` checks that the"
    yield "table is current and holds every row, with the installed Triton too, to the limits in"
    yield "`tests/aot_cases.py`.\n"
    yield from (f"- **{name}**: {meaning}" for name, meaning in list(HEADINGS.items())[1:])
    yield "\nNo kernel spills registers, and every one fits the launch it is made for.\n"
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|---" + "|---:" * (len(HEADINGS) - 1) + "|"
    yield from ("| " + " | ".join(cells) + " |" for cells in table)


def text(table: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [list(HEADINGS), *table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", type=Path, help="folder of another Triton (default: the installed one)")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    parser.add_argument("--markdown", action="store_true", help="the table for the docs")
    options = parser.parse_args()
    chosen = [case for name, case in cases(TABLE).items() if options.only in name]
    folder = DEVICE_TRITON if options.markdown and not options.triton else options.triton
    with Compiler(folder) as compiler:
        table = list(rows(compiler, chosen, options.arch or ARCHS))
    print("\n".join(markdown("3.6.0", table) if options.markdown else text(table)))


if __name__ == "__main__":
    main()
