"""How a packed weight lies in memory: the one description that packing, kernels and byte counts share.

A block holds 16 rows. Inputs come in sub-groups of 32 (one activation scale each); a weight group is one or
more whole sub-groups. Per block, in this order:

    codes    groups x subs x planes; eight words of a row, four codes each, make a sub-group. A plane holds
             8, 4, 2 or 1 bits of every code: `bits` words of 32 bits x 16 rows, each shared by 8 / bits words
             of codes, the first in the lowest bits of its bytes (Format.planes)
    scales   groups x 16 rows, IEEE half where that is exact, else float32
    offsets  groups x 16 rows: integer zeros (uint8), real minimums in the type of the scales, or nothing
             where every zero is the middle code

Four blocks are read side by side, each from a stream of its own: block b of a thread's share is number b // 4
in stream b % 4 (`arena.Room`), and the streams of the arena lie far apart. One core of Zen 3 read 12 GB/s
from one stream and 15.5 from four, where a plain sum of the same memory reached 16. The layout is the same
for every instruction set, so a packed weight can be checked anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ROWS = 16  # outputs of a block
SUB = 32  # inputs of a sub-group
STREAMS = 4  # blocks read side by side
ALIGN = 64  # bytes; a block starts on a cache line


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class Format:
    """The kinds of quantized block. half: 16-bit scales."""

    bits: int  # 2 to 8
    half: bool
    offsets: Literal["zero", "minimum", "none"]

    @property
    def name(self) -> str:
        return f"w{self.bits}_{'half' if self.half else 'full'}_{self.offsets}"

    @property
    def middle(self) -> int:
        """The zero of symmetric codes as stored: those of 8 bits lie 128 lower."""
        return 0 if self.bits == 8 else int(2 ** (self.bits - 1))

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(bits, lowest of them) of the parts of a code: 7 bits are 4, 2 and 1, the low ones first."""
        found, low = [], 0
        for width in (8, 4, 2, 1):
            if self.bits & width:
                found.append((width, low))
                low += width
        return tuple(found)

    @property
    def sub_bytes(self) -> int:
        return ROWS * SUB * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        return ROWS * (2 if self.half else 4)

    @property
    def offset_bytes(self) -> int:
        return {"zero": ROWS, "minimum": self.scale_bytes, "none": 0}[self.offsets]

    def block_bytes(self, groups: int, subs: int) -> int:
        return aligned(groups * (subs * self.sub_bytes + self.scale_bytes + self.offset_bytes))


TILES = (8, 4, 2, 1)  # rows of a batch that one pass over a block serves
TOGETHER = 4  # from so many on, computing is the bound, and not memory


def activation_bytes(inputs: int) -> int:
    """A quantized row: int8 [inputs], then per sub-group float32 scale, float32 scale x sum, int32 sum."""
    return inputs + 12 * (inputs // SUB)
