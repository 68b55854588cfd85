"""The GPU's part of building an engine: weights packed as they are read, one captured step per batch size."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from nybble.config import ServeConfig
from nybble.engine.bandwidth import available_memory
from nybble.engine.built import Built, Timer, scheme_name
from nybble.engine.gpu_runner import GpuRunner
from nybble.errors import UsageError
from nybble_kernels.quantized import Weight
from nybble_kernels.torch_cpu import quantize_rows
from nybble_kernels.triton.common import INTERPRETED
from nybble_kernels.triton.tiles import Tuning
from nybble_models import paged
from nybble_models.loader import Loader
from nybble_models.plan import MemoryPlan
from nybble_models.triton_memory import Cache, Sizes
from nybble_models.triton_step import Settings, TritonStep
from nybble_models.weights import Block, Weights

WIDTHS = (4, 8)  # of weights that are worth choosing: what lies between is read as 8
HEADROOM = 0.92  # of the free memory: the rest is for the allocator, graphs and compiled kernels
PROBE_BYTES = 1 << 30
PASSES = 9
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CACHE_TYPES = TYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def on_gpu() -> bool:
    """Whether kernels run on a GPU: Triton's interpreter works on the CPU, whatever else there is."""
    return torch.cuda.is_available() and not bool(INTERPRETED.value)


def memory() -> int:
    """Bytes that may be used on the device."""
    if not on_gpu():
        return available_memory()
    return int(torch.cuda.mem_get_info()[0] * HEADROOM)


def cache_limits(config: ServeConfig) -> dict[str, int]:
    """What `plan` should know of this device's cache: all the memory there is may hold it."""
    bits = 8 if config.kv_cache_dtype in ("int8", "fp8") else 16
    if not on_gpu():
        return {"kv_bits": bits, "apart": True}
    return {"kv_bits": bits, "apart": True, "contexts": config.max_num_seqs, "cache_bytes": memory()}


def build(config: ServeConfig, loader: Loader, planned: MemoryPlan, timer: Timer) -> Built:
    spec = loader.spec
    settings = settings_of(config, loader)
    cache_type = CACHE_TYPES.get(config.kv_cache_dtype, settings.dtype)

    def cache() -> Cache:
        blocks = planned.kv_tokens // config.block_size
        return Cache.allocate(spec, blocks, config.block_size, cache_type, settings.device)

    sizes = Sizes(
        config.max_num_seqs, config.max_num_batched_tokens, -(-planned.max_model_len // config.block_size)
    )
    weights = Weights(loader.embed(), loader.positions(), [], loader.final_norm(), loader.head())
    seen: list[Block] = []

    def blocks() -> Iterator[Block]:
        for layer in range(spec.num_layers):
            block = loader.block(layer)
            seen[:] = seen or [block]
            timer.inside("load")(layer / spec.num_layers)
            yield block

    def make() -> TritonStep:
        with torch.inference_mode():
            return TritonStep(spec, weights, blocks(), cache, head_of(weights, config), settings, sizes)

    runner = GpuRunner(timer("load", make), config.max_num_seqs)
    scheme = scheme_name(seen, loader)
    seen.clear()
    timer("warm-up", lambda: warm_up(runner, config.max_num_seqs, config.max_num_batched_tokens))
    dtype = str(settings.dtype).removeprefix("torch.")
    return Built(
        runner=runner,
        device=device_name(settings.device),
        kernels=dict.fromkeys(("decode", "prefill"), f"triton {' '.join(runner.kinds)}"),
        dtype=dtype,
        scheme=scheme,
        weight_bytes=runner.weight_bytes,
        kv_bytes_per_token=paged.bytes_per_token(spec, 8 * cache_type.itemsize),
        bandwidth=timer("bandwidth", lambda: read_bandwidth(settings.device)),
    )


def settings_of(config: ServeConfig, loader: Loader) -> Settings:
    """Types and tiles: the checkpoint's own 16-bit type unless one is asked for."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    chosen = config.dtype
    if chosen == "auto":
        stored = loader.source.config.get("dtype", loader.source.config.get("torch_dtype"))
        chosen = "float16" if stored == "float16" else "bfloat16"
    if chosen not in TYPES:
        raise UsageError(f"dtype: {chosen} is for the CPU", hint="float16 or bfloat16 on a GPU")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if device.type == "cuda" and config.kv_cache_dtype == "fp8" and capability < (8, 9):
        raise UsageError("kv_cache_dtype: this GPU has no 8-bit floats", hint="int8 is as small")
    tuning = Tuning.of_device(device, tuned_folder(config))
    return Settings(device, TYPES[chosen], tuning, pdl=capability >= (9, 0))


def tuned_folder(config: ServeConfig) -> Path:
    """Where `nybble tune` keeps what it found, before what the package brings."""
    return config.cache_path / "tuned"


def head_of(weights: Weights, config: ServeConfig) -> Weight:
    """The output matrix as kept: int8 in the widest groups that divide it, or as stored."""
    stored = weights.embed if weights.head is None else weights.head.weight
    if config.head_bits == 16 or not isinstance(stored, torch.Tensor):
        return stored
    if config.head_bits != 8:
        raise UsageError(
            f"head_bits: {config.head_bits} is not supported",
            hint="8 or 16; a 4-bit head costs too much quality",
        )
    return quantize_rows(stored, next((g for g in (128, 64, 32) if stored.shape[1] % g == 0), None))


def warm_up(runner: GpuRunner, max_batch: int, max_tokens: int) -> None:
    """Compile what serving will launch, and capture batch 1; the other sizes follow when there is time."""
    runner.prefill([0] * min(16, max_tokens), 0, [0])
    runner.score([0], 0, [0])
    for rows in {1, min(17, max_batch), min(33, max_batch)}:
        runner.decode([0] * rows, [1] * rows, [[0]] * rows)
    runner.idle()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (Triton interpreter)"


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second: the median of sums over 1 GiB, more than any cache holds."""
    if device.type != "cuda":
        from nybble.engine.bandwidth import read_bandwidth as of_host

        return of_host(1)
    size = min(PROBE_BYTES, torch.cuda.mem_get_info(device)[0] // 2)  # the cache may hold the rest
    probe = torch.ones(size // 4, device=device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(PASSES + 1)]  # type: ignore[no-untyped-call]
    probe.sum()
    for mark in marks[:-1]:
        mark.record()
        probe.sum()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [float(first.elapsed_time(second)) for first, second in pairwise(marks)]
    return size / statistics.median(times) * 1000
