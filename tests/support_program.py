"""Run a few ops of the compiled step on their own, and whole programs on tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nybble_kernels.numba import frame as at
from nybble_kernels.numba.arena import Arena, floats, words
from nybble_kernels.numba.builder import Buffer, ProgramBuilder
from nybble_kernels.numba.compiled import compiled_step, kernels
from nybble_kernels.numba.isa import choose
from nybble_kernels.numba.program import DecodeProgram
from nybble_kernels.numba.workers import Workers
from nybble_kernels.quantized import Weight
from nybble_models import paged
from nybble_models.program import build_program
from nybble_models.spec import ModelSpec
from nybble_models.weights import Weights

TOLERANCE = {  # relative RMSE against float64, by what the path rounds
    "float32": 2e-6,
    "bfloat16 weights": 2e-6,  # against the rounded weights
    "bfloat16 cache": 4e-3,
    "int8 activations": 1.2e-2,
    "int8 exact": 1e-6,  # against the rounded activations
    "whole step": 4e-2,  # int8 activations and a bfloat16 cache through three random layers
}


def error(got: Tensor, expected: Tensor) -> float:
    """Relative RMSE in float64; NaN anywhere is an infinite error."""
    difference = (got.double() - expected.double()).square().mean().sqrt()
    value = float(difference / expected.double().square().mean().sqrt())
    return float("inf") if value != value else value


def builder(
    isa: str | None = None, rows: int = 8, reserve: int = 1 << 22, threads: int = 1
) -> ProgramBuilder:
    return ProgramBuilder(kernels(choose(isa)), Arena(reserve, threads), rows)


def fill(buffer: Buffer, values: Tensor) -> None:
    view(buffer)[: len(values)] = values


def view(buffer: Buffer) -> Tensor:
    """float32 [max_batch, width], shared."""
    return torch.from_numpy(buffer.values).view(-1, buffer.width)


@dataclass
class Cache:
    """Positions and blocks of each row, for ops that read the cache."""

    kv: Tensor
    positions: Tensor
    tables: Tensor


def run(
    program: ProgramBuilder,
    rows: int,
    threads: int = 1,
    cache: Cache | None = None,
    tokens: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    """Run the ops collected so far, once."""
    frame = words(at.FRAME)
    stride = -(-program.scratch // 64) * 64
    scratch = floats(stride * threads)
    frame[at.SCRATCH], frame[at.SCRATCH_STRIDE] = scratch.ctypes.data, 4 * stride
    if cache is not None:
        kv = cache.kv
        frame[at.KV], frame[at.KV_LAYER], frame[at.KV_BLOCK] = (
            kv.data_ptr(),
            2 * kv.stride(0),
            2 * kv.stride(1),
        )
        frame[at.KV_VALUES], frame[at.BLOCK_SIZE] = 2 * kv.stride(2), kv.shape[3]
        frame[at.POSITIONS], frame[at.TABLES] = cache.positions.data_ptr(), cache.tables.data_ptr()
        frame[at.TABLE_WIDTH] = cache.tables.shape[1]
    if tokens is not None:
        frame[at.TOKENS] = tokens.data_ptr()
    if logits is not None:
        frame[at.LOGITS], frame[at.LOGITS_STRIDE] = logits.data_ptr(), 4 * logits.stride(0)
    workers = Workers(compiled_step(), frame, threads)
    workers.add(program.ops)
    workers.run(0, rows)


def rounded_activations(x: Tensor, width: int | None = None) -> Tensor:
    """What int8 activations stand for: groups of 32, scale max|x| / 127, round half to even."""
    columns = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -columns % 32)).unflatten(1, (-1, 32))
    top = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, 127 / top, 0)
    return ((padded * inverse).round() * (top / 127)).flatten(1)[:, :columns]


def program_of(
    spec: ModelSpec,
    weights: Weights,
    *,
    head: Weight | None = None,
    blocks: int = 64,
    block_size: int = 16,
    threads: int = 1,
    max_batch: int = 17,
    isa: str | None = None,
) -> tuple[DecodeProgram, Tensor]:
    """A program over a cache of its own, filled with NaN: what is read must have been written."""
    kv = paged.allocate(spec, blocks, block_size).fill_(float("nan"))
    stored = weights.embed if weights.head is None else weights.head.weight
    kept = stored if head is None else head
    made = build_program(spec, weights, kv, head=lambda: kept, threads=threads, max_batch=max_batch, isa=isa)
    return made, kv


def decode(program: DecodeProgram, tokens: Sequence[int], table: Sequence[int], vocabulary: int) -> Tensor:
    """Logits [T, V] of a sequence, one step after another, alone."""
    logits = torch.full((len(tokens), vocabulary), float("nan"))
    tables = torch.tensor([list(table)], dtype=torch.int32)
    for position, token in enumerate(tokens):
        one = np.array([token], np.int32), np.array([position], np.int32)
        program.step(*one, tables, logits[position : position + 1])
    return logits
