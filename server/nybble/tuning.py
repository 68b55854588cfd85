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
from nybble_models.hub import open_source
from nybble_models.loader import Loader
from nybble_models.triton_memory import Cache, Sizes
from nybble_models.triton_step import Settings, TritonStep
from nybble_models.weights import Weights

PHASES: tuple[Phase, ...] = ("decode", "prefill")


def tune_model(
    config: ServeConfig, rounds: int, say: Callable[[str], None], save: Callable[[Tuning], None]
) -> None:
    """Cuts for this GPU, those it had before included, saved after every product."""
    if device_of(config) is not gpu:
        raise UsageError("tune: PyTorch finds no GPU", hint="run it on the machine that serves")
    source, _ = prepare(config, lambda phase, part: None, gpu.WIDTHS)
    settings = gpu.settings_of(config, Loader(open_source(source)))
    device, processors = gpu.device_name(settings.device), settings.tuning.processors
    cuts = dict(settings.tuning.cuts)
    with torch.inference_mode():
        for linear in distinct(first_layer(config, source, settings)):
            for phase in PHASES:
                copies = copies_of(linear)
                best, times = fastest(linear, phase, settings.dtype, copies=copies, rounds=rounds)
                name = key(linear.kind, linear.outputs, linear.inputs, phase)
                cuts[name] = best
                save(Tuning(device, processors, cuts))
                say(f"{name}: {best}, {1e6 * times[best] / copies:.1f} us ({len(times)} cuts)")


def default_file(config: ServeConfig) -> Path:
    """Where `serve` looks for this GPU's cuts."""
    device = torch.device("cuda" if gpu.on_gpu() else "cpu")
    return gpu.tuned_folder(config) / file_name(gpu.device_name(device))


def first_layer(config: ServeConfig, source: Path, settings: Settings) -> TritonStep:
    """The model with one layer: it has every product there is."""
    loader = Loader(open_source(source))
    weights = Weights(loader.embed(), loader.positions(), [], loader.final_norm(), loader.head())

    def cache() -> Cache:
        return Cache.allocate(loader.spec, 1, config.block_size, settings.dtype, settings.device)

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
