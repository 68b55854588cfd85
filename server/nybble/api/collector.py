"""What is read at scrape time: the engine's snapshot, and the same under names that others look for."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

import nybble
from nybble.api import series
from nybble.api.lifecycle import Lifecycle, Loaded
from nybble.api.window import Window
from nybble.engine.stats import EngineInfo, EngineStats


class Snapshot(Collector):
    """Without a loaded model there is only the build and that nothing is ready."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._window = Window()

    def collect(self) -> Iterator[Metric]:
        yield _gauge(series.READY, {(): float(self._lifecycle.state == "ready")})
        yield _gauge(series.BUILD, {(nybble.__version__, platform.python_version()): 1.0})
        loaded = self._lifecycle.loaded
        if loaded is None:
            return
        stats, info = loaded.engine.stats(), loaded.info
        for row in series.SNAPSHOTS:
            yield _read(row, stats, info)
        rate = self._window.rate(stats.decode_bytes, stats.decode_seconds)
        yield _gauge(series.UTILIZATION, {(): rate / info.bandwidth if info.bandwidth else 0.0})
        canary = loaded.canary
        yield _gauge(series.CANARY_DIVERGENCE, {} if canary is None else {(): canary.kl_divergence})
        yield _gauge(series.CANARY_AGREEMENT, {} if canary is None else {(): canary.top1_agreement})
        facts = (info.family, info.quantization, f"{info.bits:.2f}", info.device, info.dtype)
        yield _gauge(series.MODEL, {(loaded.names[0], *facts): 1.0})
        yield _gauge(series.KERNELS, dict.fromkeys(info.kernels.items(), 1.0))

    def describe(self) -> Iterable[Metric]:
        return ()


class Aliases(Collector):
    """Nothing is observed twice: the samples of our own series are renamed and labelled on their way out."""

    def __init__(self, registry: CollectorRegistry, lifecycle: Lifecycle) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._names = {row.name.removesuffix("_total"): row.alias for row in series.ALL if row.alias}

    def collect(self) -> Iterator[Metric]:
        loaded = self._lifecycle.loaded
        if loaded is None:
            return
        labels = {"model_name": loaded.names[0], "engine": "0"}
        for metric in self._registry.collect():
            if alias := self._names.get(metric.name):
                yield _renamed(metric, f"vllm:{alias.removesuffix('_total')}", labels)
        yield _iteration_tokens(loaded.engine.stats(), labels)
        yield _cache_config(loaded, labels)


class Page(CollectorRegistry):
    """Several collectors on one page, without the `_created` samples that double every series."""

    def __init__(self, *parts: Collector | CollectorRegistry) -> None:
        super().__init__()
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        for metric in chain.from_iterable(part.collect() for part in self._parts):
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def _gauge(row: series.Series, values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(row.name, row.help, labels=row.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _read(row: series.Series, stats: EngineStats, info: EngineInfo) -> Metric:
    assert row.read is not None
    found = row.read(stats, info)
    values: dict[tuple[str, ...], float] = (
        {(): found} if isinstance(found, float | int) else {(key,): value for key, value in found.items()}
    )
    if row.kind == "gauge":
        return _gauge(row, values)
    family = CounterMetricFamily(row.name, row.help, labels=row.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _renamed(metric: Metric, name: str, labels: Mapping[str, str]) -> Metric:
    renamed = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        own = {("finished_reason" if key == "reason" else key): value for key, value in sample.labels.items()}
        renamed.samples.append(
            Sample(name + sample.name[len(metric.name) :], {**labels, **own}, sample.value, sample.timestamp)
        )
    return renamed


def _iteration_tokens(stats: EngineStats, labels: Mapping[str, str]) -> Metric:
    """The engine keeps the sum and the count only; they are what averages need."""
    family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens per step.", labels=list(labels))
    family.add_metric(list(labels.values()), [("+Inf", float(stats.steps))], float(stats.step_tokens))
    return family


def _cache_config(loaded: Loaded, labels: Mapping[str, str]) -> Metric:
    info = loaded.info
    facts = {
        "block_size": str(info.block_size),
        "num_gpu_blocks": str(info.num_blocks),
        "cache_dtype": info.dtype,
    }
    family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache; always 1.", labels=[*labels, *facts])
    family.add_metric([*labels.values(), *facts.values()], 1.0)
    return family
