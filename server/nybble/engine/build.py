"""From a config to a running engine: prepare, plan, load, pack, warm up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from nybble.config import ServeConfig
from nybble.engine.bandwidth import available_memory, read_bandwidth
from nybble.engine.cpu_runner import CpuRunner
from nybble.engine.engine import Engine
from nybble.engine.protocol import Progress
from nybble.engine.stats import EngineInfo
from nybble.errors import UsageError
from nybble.prepare import prepare
from nybble_kernels.quantized import QuantizedTensor, Weight
from nybble_kernels.torch_cpu import quantize_rows
from nybble_models import paged
from nybble_models.checkpoint import Checkpoint, read_json
from nybble_models.loader import Loader
from nybble_models.plan import MemoryPlan, Quantization, plan
from nybble_models.prefill import Prefill, Step
from nybble_models.spec import ModelSpec
from nybble_models.weights import Weights

log = logging.getLogger("nybble.engine")

T = TypeVar("T")

HEAD_GROUP = 32  # inputs that share a scale in an 8-bit head


@dataclass
class Timer:
    """Seconds by phase, and the same phases told to `progress`."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, phase: str, work: Callable[[], T]) -> T:
        self.progress(phase, 0.0)
        started = time.perf_counter()
        result = work()
        self.seconds[phase] = time.perf_counter() - started
        self.progress(phase, 1.0)
        return result


def build_engine(config: ServeConfig, progress: Progress) -> Engine:
    """Raises `UsageError`, `ModelError` or `MemoryError` with a line for the user."""
    if config.device == "cuda":
        raise UsageError("device: the GPU decode path is not part of this version", hint="--device cpu")
    timer = Timer(progress)
    directory = timer("prepare", lambda: prepare(config, progress))
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    loader = Loader(Checkpoint(directory))
    planned = _plan(config, loader)
    weights = timer("load", lambda: loader.load(lambda part: progress("load", part)))
    kv = paged.allocate(loader.spec, planned.kv_tokens // config.block_size, config.block_size)
    head = head_of(weights, config)
    kernels, step = timer("pack", lambda: make_step(config, loader.spec, weights, kv, head, threads))
    if isinstance(head, QuantizedTensor) and weights.head is not None:
        weights.head.weight = head
    prefill = Prefill(loader.spec, weights, step, kv, prefill_dtype(config))
    runner = CpuRunner(step, prefill, max_batch=config.max_num_seqs, weight_bytes=weights.nbytes())
    timer("warm-up", lambda: warm_up(runner))
    bandwidth = timer("bandwidth", lambda: read_bandwidth(threads))
    info = describe(
        config, directory, loader, weights, step, kernels, prefill, planned, bandwidth, timer.seconds
    )
    engine = Engine(
        info,
        runner,
        max_sequences=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_queue=config.max_queue,
        prefix_cache=config.prefix_cache,
    )
    engine.start()
    return engine


def _plan(config: ServeConfig, loader: Loader) -> MemoryPlan:
    settings = loader.settings
    linears = Quantization()
    if settings:
        bits = int(settings.get("bits", 4))
        linears = Quantization(bits, int(settings.get("group_size", 128)), 16 + bits)
    limit = loader.spec.max_positions
    if config.max_model_len > limit:
        raise UsageError(
            f"max_model_len: {config.max_model_len} exceeds the model's {limit} positions",
            hint="lower it, or leave it out",
        )
    if config.block_size % paged.ROWS:
        raise UsageError(
            f"block_size: {config.block_size} is not a multiple of {paged.ROWS}", hint="16 is the default"
        )
    try:
        return plan(
            loader.spec,
            linears,
            head_bits=config.head_bits,
            max_model_len=config.max_model_len,
            kv_tokens=config.kv_cache_tokens,
            block_size=config.block_size,
            max_batch_tokens=config.max_num_batched_tokens,
            memory=available_memory(),
        )
    except MemoryError as error:
        raise UsageError(
            f"{error}; {available_memory():,} are free",
            hint="lower --max-model-len, serve a smaller model, or free memory",
        ) from None


def head_of(weights: Weights, config: ServeConfig) -> Weight:
    """The output matrix as kept: int8 in groups of 32 (PyTorch's op takes whole rows), or as stored."""
    bits = config.head_bits
    stored = weights.embed if weights.head is None else weights.head.weight
    if bits == 16 or isinstance(stored, QuantizedTensor):
        return stored
    if bits != 8:
        raise UsageError(
            f"head_bits: {bits} is not supported", hint="8 or 16; a 4-bit head costs too much quality"
        )
    grouped = stored.shape[1] % HEAD_GROUP == 0 and config.kernels != "torch"
    return quantize_rows(stored, HEAD_GROUP if grouped else None)


def make_step(
    config: ServeConfig, spec: ModelSpec, weights: Weights, kv: torch.Tensor, head: Weight, threads: int
) -> tuple[str, Step]:
    """The decode step by name of its kernels; "auto" takes the compiled one where it runs."""
    if config.kernels == "triton":
        raise UsageError("kernels: Triton needs a GPU, and the GPU decode path is not part of this version")
    if config.kernels in ("auto", "numba"):
        from nybble_models.program import build_program

        program = build_program(spec, weights, kv, head=head, threads=threads, max_batch=config.max_num_seqs)
        return f"numba {program.isa}", program
    from nybble_models.torch_step import TorchStep

    if config.kernels == "reference":
        return "reference float32", TorchStep.reference(spec, weights, kv, head)
    return "torch int4", TorchStep(spec, weights, kv, head)


def prefill_dtype(config: ServeConfig) -> torch.dtype:
    """bfloat16 only where the processor multiplies it: without, it is several times slower than float32."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    return torch.float32


def warm_up(runner: CpuRunner) -> None:
    """Touch every buffer and compile whatever compiles on first use; block 0 is overwritten later."""
    runner.prefill([0] * 16, 0, [0])
    for _ in range(3):
        runner.decode([0], [1], [[0]])


def describe(
    config: ServeConfig,
    directory: Path,
    loader: Loader,
    weights: Weights,
    step: Step,
    kernels: str,
    prefill: Prefill,
    planned: MemoryPlan,
    bandwidth: float,
    seconds: Mapping[str, float],
) -> EngineInfo:
    spec = loader.spec
    dtype = str(prefill.dtype).removeprefix("torch.")
    step_bytes = step.weight_bytes_per_step
    return EngineInfo(
        model=model_name(config),
        directory=str(directory),
        family=spec.family,
        quantization=quantization_name(weights, loader),
        bits=8 * sum(step_bytes.values()) / spec.parameters,
        device="cpu",
        kernels={"decode": kernels, "prefill": f"torch {dtype}"},
        dtype=dtype,
        parameters=spec.parameters,
        weight_bytes=dict(step_bytes),
        planned_bytes={"weights": planned.weights, "kv": planned.kv, "workspace": planned.workspace},
        max_model_len=planned.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=eos_token_ids(directory, loader),
        block_size=config.block_size,
        num_blocks=planned.kv_tokens // config.block_size,
        kv_bytes_per_token=paged.bytes_per_token(spec),
        bandwidth=bandwidth,
        load_seconds=dict(seconds),
    )


def model_name(config: ServeConfig) -> str:
    return "SmolLM2-135M-Instruct" if config.model == "default" else config.model


def quantization_name(weights: Weights, loader: Loader) -> str:
    """ "awq int4 g64 asymmetric", from the first quantized linear; "none" where there is none."""
    for block in weights.blocks:
        for linear in block.linears.values():
            if isinstance(linear.weight, QuantizedTensor):
                w = linear.weight
                kind = "symmetric" if w.symmetric else "asymmetric"
                return f"{loader.settings.get('quant_method')} int{w.bits} g{w.group_size} {kind}"
    return "none"


def eos_token_ids(directory: Path, loader: Loader) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, else of config.json."""
    path = directory / "generation_config.json"
    found = (read_json(path) if path.exists() else {}).get("eos_token_id")
    if found is None:
        found = loader.source.config.get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
