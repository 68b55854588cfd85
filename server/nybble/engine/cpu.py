"""The CPU's part of building an engine: compiled or PyTorch steps, prompts as their batches or in floats."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import nybble
from nybble.config import ServeConfig
from nybble.engine.bandwidth import available_memory, read_bandwidth
from nybble.engine.built import Built, Timer, scheme_name
from nybble.engine.cpu_runner import CpuRunner
from nybble.engine.heap import tight_heap
from nybble.errors import UsageError
from nybble_kernels.quantized import QuantizedTensor, Weight, shape_of
from nybble_kernels.torch_cpu import quantize_rows
from nybble_models import paged
from nybble_models.loader import Loader
from nybble_models.plan import MemoryPlan
from nybble_models.prefill import FloatPrompts, Prompts, Step, SteppedPrompts
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Weights

if TYPE_CHECKING:
    from nybble_models.packed import PackedFile, PackedModel

WIDTHS = (3, 4, 5, 6, 8)  # of weights that are worth choosing: a step reads each in so many bits
DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What prompts are multiplied in where the step does not read them."""

HEAD_GROUP = 32  # inputs that share a scale in an 8-bit head

memory = available_memory


def cache_limits(config: ServeConfig) -> dict[str, int]:
    """What `plan` should know of this device's cache."""
    if config.kv_cache_dtype not in ("auto", "bfloat16"):
        raise UsageError(
            f"kv_cache_dtype: {config.kv_cache_dtype} needs a GPU", hint="the CPU's cache is bfloat16"
        )
    return {}


def build(config: ServeConfig, loader: Loader, planned: MemoryPlan, timer: Timer) -> Built:
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    file = packed_file(config, loader, threads)  # which files there are, before any of them is read
    bandwidth = timer("bandwidth", lambda: read_bandwidth(threads))  # early, as its probe takes memory
    kv = paged.allocate(loader.spec, planned.kv_tokens // config.block_size, config.block_size)
    packed = None if file is None else file.read()
    held = set() if packed is None else packed.held(loader.spec.tied_head)
    weights = timer("load", lambda: loader.frame(held))
    blocks = Passing(loader, timer.inside("pack"))

    def keep(model: PackedModel) -> None:
        if file is not None:
            file.write(replace(model, scheme=blocks.scheme))

    def make() -> tuple[str, Step, Prompts]:
        return make_step(config, loader.spec, weights, kv, threads, blocks, planned.weights, packed, keep)

    with tight_heap():
        kernels, step, prompts = timer("pack", make)
    sizes = dict(step.weight_bytes_per_step) | table_bytes(weights)
    runner = CpuRunner(loader.spec, step, prompts, kv, max_batch=config.max_num_seqs, weight_bytes=sizes)
    timer("warm-up", lambda: warm_up(runner))
    dtype = "float32" if config.dtype == "auto" else config.dtype
    return Built(
        runner=runner,
        device="cpu",
        kernels={
            "decode": kernels,
            "prefill": kernels if isinstance(prompts, SteppedPrompts) else f"torch {dtype}",
        },
        dtype=dtype,
        scheme=blocks.scheme if packed is None else packed.scheme,
        weight_bytes=dict(step.weight_bytes_per_step),
        kv_bytes_per_token=paged.bytes_per_token(loader.spec),
        bandwidth=bandwidth,
    )


def head_of(weights: Weights, config: ServeConfig) -> Weight:
    """The output matrix as kept: int8 in groups of 32 (PyTorch's op takes whole rows), or as stored."""
    bits = config.head_bits
    stored = weights.embed if weights.head is None else weights.head.weight
    if bits == 16 or not isinstance(stored, torch.Tensor):
        return stored
    if bits != 8:
        raise UsageError(
            f"head_bits: {bits} is not supported", hint="8 or 16; a 4-bit head costs too much quality"
        )
    grouped = stored.shape[1] % HEAD_GROUP == 0 and config.kernels != "torch"
    return quantize_rows(stored, HEAD_GROUP if grouped else None)


class Passing:
    """Blocks as they are loaded, and what the quantized linears among them are."""

    def __init__(self, loader: Loader, progress: Callable[[float], None]) -> None:
        self._loader, self._progress = loader, progress
        self.scheme = "none"

    def __iter__(self) -> Iterator[Block]:
        for block in self._loader.blocks(self._progress):
            if self.scheme == "none":
                self.scheme = scheme_name([block], self._loader)
            yield block


def table_bytes(weights: Weights) -> dict[str, int]:
    """What a step holds and does not read whole: positions, and an embedding that is not the head."""
    held = [t for t in (weights.embed, weights.positions) if t is not None and not _gone(t)]
    return {"embedding": sum(table.nbytes for table in held)}


def _gone(table: Weight) -> bool:
    return isinstance(table, torch.Tensor) and table.is_meta


def take_head(weights: Weights, config: ServeConfig, *, packed: bool) -> Weight:
    """The head to be packed. What it was made of is let go of; `packed`: and the head itself is, too, unless
    prompts are to be scored in floats.
    """
    head = head_of(weights, config)
    if isinstance(head, QuantizedTensor):
        gone = torch.empty(shape_of(head), device="meta")
        if weights.head is not None:
            weights.head.weight = gone if packed and config.dtype == "auto" else head
        elif packed:
            weights.embed = gone
    return head


def packed_file(config: ServeConfig, loader: Loader, threads: int) -> PackedFile | None:
    """Where the packed model is kept from start to start; None where it is not, or floats read prompts."""
    compiled = config.kernels in ("auto", "numba") and config.dtype == "auto"
    if not config.packed_cache or not compiled or loader.floats:
        return None
    from nybble_models.packed import PackedFile  # with Numba, which nothing else here needs

    settings = threads, config.head_bits, HEAD_GROUP, nybble.__version__
    return PackedFile.of(loader.source.files(), config.cache_path / "packed", *settings)


def make_step(
    config: ServeConfig,
    spec: ModelSpec,
    weights: Weights,
    kv: torch.Tensor,
    threads: int,
    blocks: Iterable[Block],
    reserve: int,
    packed: PackedModel | None = None,
    keep: Callable[[PackedModel], None] | None = None,
) -> tuple[str, Step, Prompts]:
    """The decode step and its name; "auto" takes the compiled one where it runs. Prompts go through it too,
    unless floats are asked for. Of a model that is `packed` already no block is read.
    """
    if config.kernels in ("auto", "numba"):
        from nybble_models.program import build_program

        program = build_program(
            spec,
            weights,
            kv,
            head=lambda: take_head(weights, config, packed=True),
            threads=threads,
            max_batch=config.max_num_seqs,
            blocks=blocks,
            reserve=reserve,
            packed=packed,
            keep=keep,
        )
        prompts: Prompts = SteppedPrompts(spec, program)
        if config.dtype != "auto":
            prompts = FloatPrompts(spec, weights, program, kv, DTYPES[config.dtype])
        return f"numba {program.isa}", program, prompts
    from nybble_models.torch_step import TorchStep

    weights.blocks += blocks
    head = take_head(weights, config, packed=False)
    plain = config.kernels == "reference"
    step = (TorchStep.reference if plain else TorchStep)(spec, weights, kv, head)
    floats = FloatPrompts(spec, weights, step, kv, DTYPES[config.dtype])
    return "reference float32" if plain else "torch int4", step, floats


def warm_up(runner: CpuRunner) -> None:
    """Touch every buffer and compile whatever compiles on first use; block 0 is overwritten later."""
    runner.prefill([0] * 16, 0, [0])
    for _ in range(3):
        runner.decode([0], [1], [[0]])
