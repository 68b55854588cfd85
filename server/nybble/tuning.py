"""What `nybble tune` does: the distinct products of a model, each cut every way on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nybble.config import ServeConfig
from nybble.engine import gpu
from nybble.engine.build import device_of
from nybble.errors import UsageError
from nybble.prepare import prepare
from nybble_kernels.triton.linear import DeviceLinear
from nybble_kernels.triton.search import fastest
from nybble_kernels.triton.tiles import Phase, Tuning, file_name, key
from nybble_models.checkpoint import Checkpoint
from nybble_models.loader import Loader
from nybble_models.triton_memory import Cache, Sizes
from nybble_models.triton_step import Settings, TritonStep
from nybble_models.weights import Weights

PHASES: tuple[Phase, ...] = ("decode", "prefill")


def tune_model(
    config: ServeConfig, rounds: int, output: Path | None, say: Callable[[str], None]
) -> tuple[Tuning, Path]:
    """Cuts for this GPU, those it had before included, and the file they belong in."""
    if device_of(config) is not gpu:
        raise UsageError("tune: PyTorch finds no GPU", hint="run it on the machine that serves")
    directory = prepare(config, lambda phase, part: None)
    settings = gpu.settings_of(config, Loader(Checkpoint(directory)))
    cuts = dict(settings.tuning.cuts)
    with torch.inference_mode():
        for linear in distinct(first_layer(config, directory, settings)):
            for phase in PHASES:
                best, times = fastest(linear, phase, settings.dtype, copies=copies_of(linear), rounds=rounds)
                name = key(linear.kind, linear.outputs, linear.inputs, phase)
                cuts[name] = best
                say(f"{name}: {best}, {1e6 * times[best]:.1f} us ({len(times)} cuts)")
    device = gpu.device_name(settings.device)
    made = Tuning(device, settings.tuning.processors, cuts)
    return made, output or gpu.tuned_folder(config) / file_name(device)


def first_layer(config: ServeConfig, directory: Path, settings: Settings) -> TritonStep:
    """The model with one layer: it has every product there is."""
    loader = Loader(Checkpoint(directory))
    weights = Weights(loader.embed(), loader.positions(), [], loader.final_norm(), loader.head())
    cache = Cache.allocate(loader.spec, 1, config.block_size, settings.dtype, settings.device)
    head = gpu.head_of(weights, config)
    return TritonStep(loader.spec, weights, [loader.block(0)], cache, head, settings, Sizes(1, 1, 1))


def distinct(step: TritonStep) -> Iterator[DeviceLinear]:
    seen = set()
    for linear in (*step.layers[0].linears(), step.head):
        shape = (linear.kind, linear.outputs, linear.inputs)
        if shape not in seen:
            seen.add(shape)
            yield linear


def copies_of(linear: DeviceLinear) -> int:
    """So many that they exceed twice the L2."""
    if linear.device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(linear.device).L2_cache_size
    return min(64, 2 * cache // linear.nbytes + 2)
