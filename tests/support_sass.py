"""Machine code as `nvdisasm` prints it: instructions, loops, what may run before a chained launch's wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

LINE = re.compile(r'//## File "(?P<file>[^"]*)", line (?P<line>\d+)')
LABEL = re.compile(r"^(?P<label>\.L_\w+):")
INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)")
GLOBAL_LOADS = ("LDG", "LDGSTS", "LD")
GLOBAL_WRITES = ("STG", "ST", "ATOMG", "ATOM", "RED", "REDG", "UTMASTG", "UTMAREDG")
ENDS = ("EXIT", "RET", "BRX", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `file` and `line` are the Python source it was made from."""

    name: str
    operands: str
    predicate: str
    file: str
    line: int

    @property
    def stem(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes a lane moves."""
        parts = self.name.split(".")
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in reversed(parts) if part in sizes), 4)

    @property
    def place(self) -> tuple[str, int]:
        return self.file, self.line

    @property
    def prefetch(self) -> bool:
        """Asks the L2 cache for a line."""
        return self.stem in ("CCTL", "UBLKPF") and "PF" in self.name

    @property
    def conditional(self) -> bool:
        """Whether control may also go on to the next instruction."""
        return (
            bool(self.predicate) or "," in TARGET.sub("", self.operands) or "P" in self.operands.split("`")[0]
        )


class Program:
    """The instructions of one kernel and the control flow between them."""

    def __init__(self, text: str) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        file, line = "", 0
        for row in text.splitlines():
            if found := LABEL.match(row):
                self.labels[found["label"]] = len(self.code)
            elif found := LINE.search(row):
                file, line = found["file"], int(found["line"])
            elif (found := INSTRUCTION.search(row)) and found["name"] != "NOP":
                self.code.append(
                    Instruction(
                        found["name"],
                        found["operands"].strip(),
                        (found["predicate"] or "").strip(),
                        file,
                        line,
                    )
                )

    def successors(self, index: int) -> Iterator[int]:
        each = self.code[index]
        if each.stem == "BRA" and (found := TARGET.search(each.operands)):
            yield self.labels[found["label"]]
            if not each.conditional:
                return
        elif each.stem in ENDS and not each.predicate:
            return
        if index + 1 < len(self.code):
            yield index + 1

    @cached_property
    def blocks(self) -> dict[int, range]:
        """Stretches without a branch into or out of them, by their first instruction; reachable ones only."""
        leaders = {0} | set(self.labels.values())
        leaders |= {i + 1 for i, each in enumerate(self.code) if each.stem in ("BRA", *ENDS)}
        starts = sorted(start for start in leaders if start < len(self.code))
        ends = [*starts[1:], len(self.code)]
        blocks = {start: range(start, end) for start, end in zip(starts, ends, strict=True)}
        seen, todo = set(), [0]
        while todo:
            if (start := todo.pop()) not in seen:
                seen.add(start)
                todo.extend(self.successors(blocks[start][-1]))
        return {start: blocks[start] for start in starts if start in seen}

    @cached_property
    def loops(self) -> list[list[int]]:
        """Natural loops: what can reach a jump back to a block that every way to the jump passes."""
        into: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, block in self.blocks.items():
            for target in self.successors(block[-1]):
                into[target].append(start)
        above = self._dominators(into)
        bodies: dict[int, set[int]] = {}
        for head in self.blocks:
            for tail in into[head]:
                if head in above[tail]:
                    body = bodies.setdefault(head, {head})
                    todo = [tail]
                    while todo:
                        if (start := todo.pop()) not in body:
                            body.add(start)
                            todo.extend(into[start])
        return [[i for start in sorted(body) for i in self.blocks[start]] for body in bodies.values()]

    def _dominators(self, into: dict[int, list[int]]) -> dict[int, set[int]]:
        above = {start: set(self.blocks) for start in self.blocks}
        above[0] = {0}
        changed = True
        while changed:
            changed = False
            for start in self.blocks:
                if (
                    start
                    and (new := set.intersection(*(above[p] for p in into[start])) | {start}) != above[start]
                ):
                    above[start], changed = new, True
        return above

    @cached_property
    def before_wait(self) -> list[int]:
        """What can run before the grid waits for the one it depends on, ACQBULK; all where it never waits."""
        seen: set[int] = set()
        todo = [0]
        while todo:
            if (index := todo.pop()) not in seen:
                seen.add(index)
                if self.code[index].stem != "ACQBULK":
                    todo.extend(self.successors(index))
        return sorted(seen)

    def hot(self, bytes_streamed: Callable[[Instruction], float]) -> list[int]:
        """The innermost loop that streams the most; all instructions where nothing streams in a loop."""

        def total(body: list[int]) -> float:
            return sum(bytes_streamed(self.code[i]) for i in body)

        best = max(self.loops, key=lambda body: (total(body), -len(body)), default=[])
        return best if total(best) else [i for block in self.blocks.values() for i in block]
