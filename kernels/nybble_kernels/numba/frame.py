"""The two tables that a compiled step reads: the ops of the program, and the addresses of this call.

An op is a record of int64: its code, how its work divides into units, then its own arguments. The frame holds
what changes from call to call. Both are addressed from compiled code with `get_i64`.
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """What an op does."""

    EMBED = 0
    NORM = 1
    QUANTIZE = 2
    GEMV = 3
    PLACE = 4
    ATTEND = 5
    ACTIVATE = 6
    DEQUANTIZE = 7
    MERGE = 8


RECORD = 24  # int64 of an op
CODE, PER_ROW, FIXED, CHUNK, SHARES, FIRST = 0, 1, 2, 3, 4, 5
# units of work = PER_ROW * rows + FIXED in SHARES equal parts, taken CHUNK at a time; arguments from FIRST on

FRAME = 16  # int64 of a frame
TOKENS, POSITIONS, TABLES, TABLE_WIDTH, LOGITS, LOGITS_STRIDE = 0, 1, 2, 3, 4, 5
KV, KV_LAYER, KV_BLOCK, KV_VALUES, BLOCK_SIZE, SCRATCH, SCRATCH_STRIDE = 6, 7, 8, 9, 10, 11, 12
# strides of the cache in bytes; KV_VALUES is how far the values of a block lie behind its keys


def record(
    code: Code, *arguments: int, per_row: int = 0, fixed: int = 0, chunk: int = 1, shares: int = 1
) -> list[int]:
    """One op as the compiled step reads it. shares: one for each thread, where units belong to threads."""
    filling = RECORD - FIRST - len(arguments)
    return [int(code), per_row, fixed, chunk, shares, *arguments, *[0] * filling]
