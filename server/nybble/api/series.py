"""Every metric as a row of data: collectors, aliases and docs/metrics.md are all made from these tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nybble.engine.stats import EngineInfo, EngineStats

Kind = Literal["gauge", "counter", "histogram"]
Read = Callable[[EngineStats, EngineInfo], float | Mapping[str, float]]


def _edges(text: str) -> tuple[float, ...]:
    return tuple(float(edge) for edge in text.split())


FIRST = _edges(".002 .005 .01 .02 .03 .05 .075 .1 .15 .25 .5 1 2.5 5 10 30 60")
TOKEN = _edges(".0005 .001 .0015 .002 .0025 .003 .004 .005 .006 .008 .01 .0125 .015 .02 .03 .05 .1 .25 1 5")
PHASE = _edges(".001 .0025 .005 .01 .025 .05 .1 .25 .5 1 2.5 5 10 30 60 120 300 600")
COUNT = _edges("1 2 5 10 20 50 100 200 500 1e3 2e3 5e3 1e4 2e4 5e4 1e5 2e5")


@dataclass(frozen=True, slots=True)
class Series:
    """`read` gives its value at scrape time, or one value for each value of its label.

    `alias` is the name, behind `vllm:`, that existing dashboards and autoscalers ask for.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    alias: str | None = None
    read: Read | None = None


def _histogram(name: str, help: str, buckets: tuple[float, ...], alias: str) -> Series:
    return Series(name, "histogram", help, buckets=buckets, alias=alias)


def _gauge(name: str, help: str, read: Read, *labels: str, alias: str | None = None) -> Series:
    return Series(name, "gauge", help, labels, alias=alias, read=read)


def _counter(name: str, help: str, read: Read, alias: str | None = None) -> Series:
    return Series(name, "counter", help, alias=alias, read=read)


FIRST_TOKEN = _histogram(
    "nybble_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    FIRST,
    "time_to_first_token_seconds",
)
INTER_TOKEN = _histogram(
    "nybble_inter_token_latency_seconds",
    "From one token to the next, once per token.",
    TOKEN,
    "inter_token_latency_seconds",
)
PER_OUTPUT_TOKEN = _histogram(
    "nybble_request_time_per_output_token_seconds",
    "Mean time of a token after the first, once per request.",
    TOKEN,
    "request_time_per_output_token_seconds",
)
REQUEST = _histogram(
    "nybble_request_seconds",
    "From a request's arrival to its last token.",
    PHASE,
    "e2e_request_latency_seconds",
)
QUEUE = _histogram(
    "nybble_request_queue_seconds", "Waiting for the first step.", PHASE, "request_queue_time_seconds"
)
PREFILL = _histogram(
    "nybble_request_prefill_seconds", "Reading the prompt.", PHASE, "request_prefill_time_seconds"
)
DECODE = _histogram(
    "nybble_request_decode_seconds", "From the first token to the last.", PHASE, "request_decode_time_seconds"
)
INFERENCE = _histogram(
    "nybble_request_inference_seconds",
    "Prefill and decode together.",
    PHASE,
    "request_inference_time_seconds",
)
PROMPT_TOKENS = _histogram(
    "nybble_request_prompt_tokens", "Prompt tokens of a finished request.", COUNT, "request_prompt_tokens"
)
GENERATION_TOKENS = _histogram(
    "nybble_request_generation_tokens",
    "Tokens generated for a finished request.",
    COUNT,
    "request_generation_tokens",
)
FINISHED = Series(
    "nybble_requests_finished_total",
    "counter",
    "Sequences by how they ended: stop, length, abort (the client left), error.",
    ("reason",),
    alias="request_success_total",
)
HTTP_REQUESTS = Series(
    "nybble_http_requests_total",
    "counter",
    "Responses; status 499 stands for a client that left before its answer.",
    ("method", "handler", "status"),
)
HTTP_SECONDS = Series(
    "nybble_http_request_seconds",
    "histogram",
    "From a request's arrival to its last byte.",
    ("method", "handler"),
    PHASE,
)

SNAPSHOTS = (
    _gauge(
        "nybble_requests_running",
        "Sequences in the running batch.",
        lambda s, i: s.running,
        alias="num_requests_running",
    ),
    _gauge(
        "nybble_requests_waiting",
        "Sequences in the queue.",
        lambda s, i: s.waiting,
        alias="num_requests_waiting",
    ),
    _gauge(
        "nybble_kv_blocks",
        "KV blocks by state; the states add up to the pool.",
        lambda s, i: {"live": s.blocks_live, "cached": s.blocks_cached, "free": s.blocks_free},
        "state",
    ),
    _gauge("nybble_kv_pool_blocks", "KV blocks in the pool.", lambda s, i: s.blocks_total),
    _gauge(
        "nybble_kv_usage_ratio",
        "Live KV blocks over the pool.",
        lambda s, i: s.blocks_live / max(s.blocks_total, 1),
        alias="kv_cache_usage_perc",
    ),
    _counter(
        "nybble_prefix_query_tokens_total",
        "Prompt tokens looked up in the prefix cache.",
        lambda s, i: s.prefix_query_tokens,
        "prefix_cache_queries_total",
    ),
    _counter(
        "nybble_prefix_hit_tokens_total",
        "Prompt tokens found in the prefix cache.",
        lambda s, i: s.prefix_hit_tokens,
        "prefix_cache_hits_total",
    ),
    _counter(
        "nybble_preemptions_total",
        "Times a sequence gave up its KV blocks, to be computed again.",
        lambda s, i: s.preemptions,
        "num_preemptions_total",
    ),
    _counter(
        "nybble_prompt_tokens_total",
        "Prompt tokens processed.",
        lambda s, i: s.prompt_tokens,
        "prompt_tokens_total",
    ),
    _counter(
        "nybble_generation_tokens_total",
        "Tokens generated.",
        lambda s, i: s.generation_tokens,
        "generation_tokens_total",
    ),
    _counter("nybble_engine_steps_total", "Steps of the engine.", lambda s, i: s.steps),
    _counter(
        "nybble_engine_step_tokens_total", "Tokens in the steps of the engine.", lambda s, i: s.step_tokens
    ),
    _counter("nybble_decode_steps_total", "Steps that only decoded.", lambda s, i: s.decode_steps),
    _counter(
        "nybble_decode_seconds_total", "Time spent in steps that only decoded.", lambda s, i: s.decode_seconds
    ),
    _counter(
        "nybble_decode_bytes_read_total",
        "Bytes that steps that only decoded had to read: weights, scales, KV.",
        lambda s, i: s.decode_bytes,
    ),
    _gauge(
        "nybble_memory_bandwidth_bytes_per_second",
        "Read bandwidth measured at start.",
        lambda s, i: i.bandwidth,
    ),
    _counter("nybble_nan_logits_total", "Times that logits were not numbers.", lambda s, i: s.nan_logits),
    _gauge("nybble_weight_bytes", "Bytes of the weights by kind.", lambda s, i: i.weight_bytes, "kind"),
    _gauge(
        "nybble_memory_planned_bytes",
        "Memory planned before loading, by kind.",
        lambda s, i: i.planned_bytes,
        "kind",
    ),
    _gauge("nybble_memory_used_bytes", "Memory in use, by kind.", lambda s, i: s.used_bytes, "kind"),
    _gauge(
        "nybble_startup_seconds", "Time that starting took, by phase.", lambda s, i: i.load_seconds, "phase"
    ),
    _gauge("nybble_model_context_tokens", "Longest prompt plus answer.", lambda s, i: i.max_model_len),
)

UTILIZATION = Series(
    "nybble_decode_bandwidth_utilization_ratio",
    "gauge",
    "Bytes that decoding had to read per second over the measured bandwidth; latest window with decoding.",
)
CANARY_DIVERGENCE = Series(
    "nybble_quality_canary_kl_divergence",
    "gauge",
    "Of the served model from the unquantized one on the checkpoint's prompts, nats a token; if it has any.",
)
CANARY_AGREEMENT = Series(
    "nybble_quality_canary_top1_agreement_ratio",
    "gauge",
    "Tokens of these prompts on which both have the same first choice.",
)
READY = Series("nybble_ready", "gauge", "1 while requests are welcome.")
BUILD = Series("nybble_build_info", "gauge", "Versions; always 1.", ("version", "python"))
MODEL = Series(
    "nybble_model_info",
    "gauge",
    "The model that is served; always 1.",
    ("model_name", "family", "quantization", "bits", "device", "dtype"),
)
KERNELS = Series(
    "nybble_kernels_info", "gauge", "Which kernels run each phase; always 1.", ("phase", "kernels")
)

OBSERVED = (
    *(FIRST_TOKEN, INTER_TOKEN, PER_OUTPUT_TOKEN, REQUEST, QUEUE, PREFILL, DECODE, INFERENCE),
    *(PROMPT_TOKENS, GENERATION_TOKENS, FINISHED, HTTP_REQUESTS, HTTP_SECONDS),
)
CANARY = (CANARY_DIVERGENCE, CANARY_AGREEMENT)
ALL = (*OBSERVED, *SNAPSHOTS, UTILIZATION, *CANARY, READY, BUILD, MODEL, KERNELS)
