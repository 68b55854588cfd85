"""The pointers that a load of the machine code reads through, and what chained launches must keep to.

A kernel that is launched with `launch_pdl` starts while the one before it runs. Until its wait (ACQBULK) it
may write nothing and read only what the kernels it overlaps do not write; no program may end without that
wait. The compiler may move a load up over the wait, so the machine code is asked, not the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from support_sass import GLOBAL_LOADS, GLOBAL_WRITES, Program

LOCATION = re.compile(r"^#(?P<name>loc\d*) = loc\((?P<text>.*)\)$")
PLACE = re.compile(r'^"(?P<file>[^"]*)":(?P<line>\d+):\d+$')
RESULT = re.compile(r"^\s*(?P<value>%\w+)(?::\d+)? = (?P<op>[\w.]+)(?P<rest>.*)$")
USE = re.compile(r"%\w+(?:#\d+)?")
CARRIED = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")
AT = re.compile(r"loc\(#(?P<name>loc\d*)\)\s*\{?$")
TILE = re.compile(r": tensor<(?P<shape>(?:\d+x)+)!tt\.ptr<[a-zA-Z]+(?P<bits>\d+)")

Place = tuple[str, int]  # a file and a line of it


@dataclass(frozen=True)
class Source:
    """The kernel arguments that the loads of a line read through, and the bytes of the tile they load."""

    pointers: frozenset[str]
    tile: int


def chain_faults(
    program: Program, sources: Mapping[Place, Source], before_wait: tuple[str, ...]
) -> Iterator[str]:
    """What breaks the protocol; loads through the pointers of `before_wait` may come early."""
    early = [program.code[i] for i in program.before_wait]
    if any(each.stem == "EXIT" for each in early):
        yield "a program can end without waiting"
    for each in early:
        if each.stem in GLOBAL_WRITES:
            yield f"the {each.name} of line {each.line} can run before the wait"
        if each.stem in GLOBAL_LOADS:
            source = sources.get(each.place)
            names = source.pointers if source else frozenset({"something unknown"})
            if not names & set(before_wait):
                yield f"line {each.line} reads {' or '.join(sorted(names))} before the wait"


def load_sources(ttir: str) -> dict[Place, Source]:
    """By the line of source they are written on."""
    places = locations(ttir)
    origin: dict[str, list[str]] = {}  # a pointer, and what it was made from
    found: dict[Place, Source] = {}
    for row in ttir.splitlines():
        if (result := RESULT.match(row)) is None:
            continue
        uses = USE.findall(result["rest"])
        if result["op"] == "scf.for":
            carried = CARRIED.findall(result["rest"])
            origin.update({inside: [start] for inside, start in carried})
            origin.update({f"{result['value']}#{i}": [start] for i, (_, start) in enumerate(carried)})
            origin[result["value"]] = [carried[0][1]] if carried else []
        else:
            origin[result["value"]] = uses if result["op"] == "arith.select" else uses[:1]
        if result["op"] == "tt.load" and (at := AT.search(row)) and at["name"] in places:
            place, tile = places[at["name"]], TILE.search(row)
            pointers = arguments(uses[0], origin) | (found[place].pointers if place in found else set())
            found[place] = Source(frozenset(pointers), tile_bytes(tile["shape"], tile["bits"]) if tile else 0)
    return found


def tile_bytes(shape: str, bits: str) -> int:
    return math.prod(map(int, shape.removesuffix("x").split("x"))) * max(8, int(bits)) // 8


def arguments(value: str, origin: Mapping[str, list[str]]) -> set[str]:
    """The arguments a pointer is made from."""
    found, seen, todo = set(), set(), [value]
    while todo:
        if (each := todo.pop()) in seen:
            continue
        seen.add(each)
        if each in origin:
            todo.extend(origin[each])
        else:
            found.add(each.removeprefix("%"))
    return found


def locations(ttir: str) -> dict[str, Place]:
    """File and line by name; of an inlined call the innermost."""
    texts = {found["name"]: found["text"] for row in ttir.splitlines() if (found := LOCATION.match(row))}

    def place(name: str) -> Place | None:
        text = texts.get(name, "")
        if found := PLACE.match(text):
            return found["file"], int(found["line"])
        inner = re.search(r"#(loc\d*)", text)
        return place(inner[1]) if inner else None

    return {name: spot for name in texts if (spot := place(name))}
