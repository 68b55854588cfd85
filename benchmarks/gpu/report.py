"""Tables and the roofline plot of docs/kernels.md, from the rows of benchmarks/results/gpu.jsonl.

python benchmarks/gpu/report.py            write both into docs/
python benchmarks/gpu/report.py --check    exit status 1 if what is there is not what the rows say
python benchmarks/gpu/report.py --print    the tables of devices with rows, on the terminal
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import paths
import tables
from part import RESULTS
from results import Results, load
from roofline import svg

PAGE = paths.ROOT / "docs" / "kernels.md"
PLOT = paths.ROOT / "docs" / "roofline.svg"
SECTION = re.compile(r"(<!-- begin: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, sections: dict[str, str]) -> str:
    """The page with every generated section replaced. Raises `KeyError` for a section nobody makes."""
    return SECTION.sub(lambda found: f"{found[1]}{sections[found[2]]}\n{found[3]}", page)


def pages(devices: list[Results]) -> dict[Path, str]:
    return {
        PAGE: filled(PAGE.read_text(encoding="utf8"), tables.sections(devices)),
        PLOT: svg(devices),
    }


def stale(files: dict[Path, str]) -> list[str]:
    return [
        path.name
        for path, text in files.items()
        if not path.exists() or path.read_text(encoding="utf8") != text
    ]


def show(devices: list[Results]) -> None:
    """Only what has rows; the goals last."""
    seen = [found for found in devices if found.rows]
    if not seen:
        print("report: no rows yet")
        return
    nothing = tables.sections([Results(found.device, ()) for found in seen])
    empty = {line for text in nothing.values() for line in text.splitlines() if tables.NO_ROWS in line}
    if any(found.rows[0]["dry"] for found in seen):
        print("a dry run: the figures below show that the pages are made, and nothing else")
    made = tables.sections(seen)
    goals = made.pop("goals")
    for name, text in made.items():
        lines = [line for line in text.splitlines() if line not in empty]
        print("\n".join((f"\n{name}", *lines)).replace(tables.NO_ROWS, "-"))
    print(f"\ngoals\n{goals}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of gpu.jsonl")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--print", action="store_true", help="write nothing, show")
    parser.add_argument("--dry", action="store_true", help="rows of a dry run instead")
    asked = parser.parse_args()
    devices = load(asked.rows, asked.dry)
    if asked.print:
        show(devices)
        return 0
    files = pages(devices)
    if asked.check:
        old = stale(files)
        print(f"stale: {', '.join(old)}; python benchmarks/gpu/report.py" if old else "current")
        return 1 if old else 0
    for path, text in files.items():
        path.write_text(text, encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
