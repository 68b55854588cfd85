"""Where a model is computed: on the processor, or block by block on a GPU.

Files are read and written on the CPU. What is computed with lies on the device: blocks, the text's states (as
long as they are not kept in files), Hessians, candidates. Random numbers are drawn on the CPU, so that a seed
means the same everywhere, and no sum depends on the order in which a GPU happens to add.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble_models.errors import ModelError
from nybble_models.loader import CPU
from nybble_models.weights import Block, Norm
from nybble_quantizers.workers import Map, in_turn, side_by_side

Name = Literal["auto", "cpu", "cuda"]


def device_named(name: Name) -> torch.device:
    """ "auto" is a GPU where PyTorch finds one. Raises `ModelError` where "cuda" is none."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ModelError("PyTorch finds no GPU", hint="--device cpu")
    return torch.device("cuda") if found and name != "cpu" else CPU


def facts(device: torch.device) -> dict[str, str]:
    """What else decides which bytes are written there."""
    if device == CPU:
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody has taken."""
    return torch.cuda.mem_get_info(device)[0]


@contextmanager
def too_small(device: torch.device) -> Iterator[None]:
    """Says in one line that a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError:
        name = facts(device).get("gpu", device.type)
        raise ModelError(
            f"{name} has too little memory",
            hint="free some of it, or name less with --memory, and the same command goes on; or --device cpu",
        ) from None


def moved(block: Block, device: torch.device) -> Block:
    linears = {
        name: replace(
            linear,
            weight=linear.weight.to(device),
            bias=None if linear.bias is None else linear.bias.to(device),
        )
        for name, linear in block.linears.items()
    }
    norms = {
        role: Norm(norm.weight.to(device), None if norm.bias is None else norm.bias.to(device))
        for role, norm in block.norms.items()
    }
    return Block(linears, norms)


@contextmanager
def working_on(device: torch.device) -> Iterator[Map]:
    """How independent pieces of work are done there.

    A GPU does one after the other: each fills it, and all would share its memory. Its fused attention adds
    gradients in any order, so it takes the plain one.
    """
    if device == CPU:
        with side_by_side() as run:
            yield run
    else:
        with sdpa_kernel(SDPBackend.MATH):
            yield in_turn
