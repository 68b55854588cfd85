"""The metrics of one app, in a registry of its own."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder

from nybble.api import series
from nybble.api.collector import Aliases, Page, Snapshot
from nybble.api.lifecycle import Lifecycle
from nybble.engine.request import FinishReason

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")


class Metrics:
    """Histograms and counters are bound once: an observation is one call."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.registry = CollectorRegistry()
        self.first_token = self._histogram(series.FIRST_TOKEN)
        self.inter_token = self._histogram(series.INTER_TOKEN)
        self.per_output_token = self._histogram(series.PER_OUTPUT_TOKEN)
        self.request = self._histogram(series.REQUEST)
        self.queue = self._histogram(series.QUEUE)
        self.prefill = self._histogram(series.PREFILL)
        self.decode = self._histogram(series.DECODE)
        self.inference = self._histogram(series.INFERENCE)
        self.prompt_tokens = self._histogram(series.PROMPT_TOKENS)
        self.generation_tokens = self._histogram(series.GENERATION_TOKENS)
        finished = self._counter(series.FINISHED)
        self.finished = {reason: finished.labels(reason) for reason in _REASONS}
        self.http_requests = self._counter(series.HTTP_REQUESTS)
        self.http_seconds = self._histogram(series.HTTP_SECONDS)
        self.registry.register(Snapshot(lifecycle))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._own = Page(self.registry)
        self._with_aliases = Page(self.registry, Aliases(self.registry, lifecycle))

    def exposition(self, accept: str, *, aliases: bool = True) -> tuple[bytes, str]:
        """The page that Prometheus scrapes, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._with_aliases if aliases else self._own), content_type

    def _histogram(self, row: series.Series) -> Histogram:
        return Histogram(row.name, row.help, row.labels, buckets=row.buckets, registry=self.registry)

    def _counter(self, row: series.Series) -> Counter:
        return Counter(row.name, row.help, row.labels, registry=self.registry)
