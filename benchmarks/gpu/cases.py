"""The cases of the linears, by importance: what is measured first where time may run out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import paths  # noqa: F401
import torch
from shapes import MODELS, TINY, linears
from torch import Tensor

MODEL_ORDER = ("Llama-2-7B", "Llama-3.1-8B", "OPT-6.7B")
ROW_ORDER = ((1, 16, 512), (4, 8, 2), (64, 2048))


@dataclass(frozen=True)
class Case:
    model: str
    projection: str
    outputs: int
    inputs: int
    rows: tuple[int, ...]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Groups of batches over one matrix: the most telling batches of every model before the next ones."""
    if arguments.dry:
        for projection, rows in (("o", (1, 3)), ("down", (1,))):
            yield Case("tiny", projection, *linears(TINY)[projection], rows)
        return
    for tier in ROW_ORDER:
        rows = tuple(m for m in tier if m in arguments.rows)
        for model in arguments.models:
            for projection, (outputs, inputs) in linears(MODELS[model]).items() if rows else ():
                yield Case(model, projection, outputs, inputs, rows)


def inputs_of(m: int, k: int, dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (m, k), device=device, dtype=torch.int8)
    return torch.randn(m, k, device=device).to(dtype)
