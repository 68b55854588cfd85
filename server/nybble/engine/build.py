"""From a config to a running engine: prepare, plan, load, pack, warm up."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from nybble.config import ServeConfig
from nybble.engine import cpu
from nybble.engine.built import Built, Timer
from nybble.engine.engine import Engine
from nybble.engine.protocol import Progress
from nybble.engine.runner import Runner
from nybble.engine.stats import EngineInfo
from nybble.errors import UsageError
from nybble.prepare import prepare
from nybble_models import paged
from nybble_models.checkpoint import read_json
from nybble_models.footprint import linear_held_as, tables_held_as
from nybble_models.formats.gguf import Gguf
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.plan import MemoryPlan, plan

log = logging.getLogger("nybble.engine")


def build_engine(config: ServeConfig, progress: Progress) -> Engine:
    """Raises `UsageError`, `ModelError` or `MemoryError` with a line for the user."""
    info, runner = build_runner(config, progress)
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


def build_runner(config: ServeConfig, progress: Progress) -> tuple[EngineInfo, Runner]:
    """What an engine drives, and what there is to say about it. Raises as `build_engine` does."""
    device = device_of(config)
    timer = Timer(progress)
    source, directory = timer("prepare", lambda: prepare(config, progress, device.WIDTHS))
    loader = Loader(open_source(source))
    tell_types(loader)
    planned = _plan(config, loader, device)
    built: Built = device.build(config, loader, planned, timer)
    return describe(config, directory, loader, built, planned, timer), built.runner


def usable_gpu() -> bool:
    """NVIDIA's, of compute capability 8.0 or later: the kernels hold its instructions."""
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def device_of(config: ServeConfig) -> ModuleType:
    """The module that builds for the chosen device; "auto" takes a GPU where Triton can use one."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    interpreted = config.kernels == "triton" and interpreting
    found = usable_gpu() and not interpreting
    if config.device == "cuda" and not found:
        why = "TRITON_INTERPRET=1 keeps off it" if usable_gpu() else "PyTorch finds no GPU of sm_80 or later"
        raise UsageError(f"device: cuda was asked for, and {why}", hint="--device cpu")
    if config.kernels == "triton" and not interpreted and (not found or config.device == "cpu"):
        why = "--device is cpu" if found else "PyTorch finds none"
        raise UsageError(f"kernels: triton runs on a GPU, and {why}", hint="--kernels auto")
    if not interpreted and (
        not found or config.device == "cpu" or config.kernels in ("numba", "torch", "reference")
    ):
        if config.device == "cuda":
            raise UsageError(
                f"kernels: {config.kernels} runs on the CPU", hint="--kernels auto, or --device cpu"
            )
        return cpu
    try:
        from nybble.engine import gpu
    except ImportError as error:
        if config.device == "auto" and config.kernels == "auto":
            log.warning("the GPU is not used: %s (pip install 'nybble[gpu]')", error)
            return cpu
        raise UsageError(f"device: {error}", hint="pip install 'nybble[gpu]'") from None
    return gpu


def _plan(config: ServeConfig, loader: Loader, device: ModuleType) -> MemoryPlan:
    widens = device is cpu  # it has no product of 8-bit floats
    head, embedding = tables_held_as(loader, config.head_bits, widens=widens)
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
    memory = device.memory()
    try:
        return plan(
            loader.spec,
            partial(linear_held_as, loader, widens=widens),
            head=head,
            embedding=embedding,
            max_model_len=config.max_model_len,
            kv_tokens=config.kv_cache_tokens,
            block_size=config.block_size,
            max_batch_tokens=config.max_num_batched_tokens,
            memory=memory,
            **device.cache_limits(config),
        )
    except MemoryError as error:
        raise UsageError(
            f"{error}; {memory:,} are free",
            hint="lower --max-model-len, serve a smaller model, or free memory",
        ) from None


def tell_types(loader: Loader) -> None:
    """Which matrices of a GGUF file keep their levels, and which are read as floats."""
    if not isinstance(loader.source, Gguf):
        return
    exact, floats = (
        ", ".join(f"{count} {kind.name}" for kind, count in kinds.most_common()) or "none"
        for kinds in loader.source.kinds()
    )
    log.info("%s: matrices served as stored: %s; as floats: %s", loader.source.path.name, exact, floats)


def describe(
    config: ServeConfig, directory: Path, loader: Loader, built: Built, planned: MemoryPlan, timer: Timer
) -> EngineInfo:
    spec = loader.spec
    return EngineInfo(
        model=model_name(config),
        directory=str(directory),
        family=spec.family,
        quantization=built.scheme,
        bits=8 * sum(built.weight_bytes.values()) / spec.parameters,
        device=built.device,
        kernels=dict(built.kernels),
        dtype=built.dtype,
        parameters=spec.parameters,
        weight_bytes=dict(built.weight_bytes),
        planned_bytes={"weights": planned.weights, "kv": planned.kv, "workspace": planned.workspace},
        max_model_len=planned.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=eos_token_ids(directory, loader),
        block_size=config.block_size,
        num_blocks=planned.kv_tokens // config.block_size,
        kv_bytes_per_token=built.kv_bytes_per_token,
        bandwidth=built.bandwidth,
        load_seconds=dict(timer.seconds),
    )


def model_name(config: ServeConfig) -> str:
    return "SmolLM2-135M-Instruct" if config.model == "default" else config.model


def eos_token_ids(directory: Path, loader: Loader) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, else of config.json."""
    path = directory / "generation_config.json"
    found = (read_json(path) if path.exists() else {}).get("eos_token_id")
    if found is None:
        found = loader.source.config.get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
