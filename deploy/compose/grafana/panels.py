"""What the dashboard shows, as data: title, unit, queries. `generate.py` makes Grafana's JSON of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SELECTOR = 'job=~"$job",instance=~"$instance"'
INTERVAL = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """`queries` are pairs of PromQL and legend. Heatmaps take one query, by `le`."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str = ""
    kind: Literal["stat", "timeseries", "heatmap", "table"] = "timeseries"
    stacked: bool = False
    width: int = 8


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def now(name: str, *labels: str, **matches: str) -> str:
    """A gauge, summed over servers."""
    return _by("sum", f"{name}{_selector(matches)}", labels)


def rate(name: str, *labels: str, **matches: str) -> str:
    """A counter's growth a second, summed over servers."""
    return _by("sum", f"rate({name}{_selector(matches)}[{INTERVAL}])", labels)


def mean(name: str) -> str:
    """The mean of a histogram's observations."""
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def quantile(q: float, name: str) -> str:
    return f"histogram_quantile({q}, {rate(name + '_bucket', 'le')})"


def quantiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(q, name), f"p{round(100 * q)}") for q in (0.5, 0.9, 0.99))


def share(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def _by(how: str, expression: str, labels: tuple[str, ...]) -> str:
    return f"{how} by ({', '.join(labels)}) ({expression})" if labels else f"{how}({expression})"


def _selector(matches: dict[str, str]) -> str:
    extra = "".join(f',{label}=~"{pattern}"' for label, pattern in matches.items())
    return "{" + SELECTOR + extra + "}"


TTFT = "nybble_time_to_first_token_seconds"
ITL = "nybble_inter_token_latency_seconds"
WHOLE = "nybble_request_seconds"
UTILIZATION = f"avg(nybble_decode_bandwidth_utilization_ratio{{{SELECTOR}}})"
REFUSED = f"({rate('nybble_http_requests_total', status='5..')} or vector(0))"

OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Ready",
            "short",
            ((now("nybble_ready"), "ready"),),
            "Servers that take requests.",
            "stat",
            width=3,
        ),
        Panel(
            "Requests",
            "reqps",
            ((rate("nybble_requests_finished_total"), "requests"),),
            "Finished sequences.",
            "stat",
            width=3,
        ),
        Panel(
            "Output",
            "short",
            ((rate("nybble_generation_tokens_total"), "tokens/s"),),
            "Tokens/s.",
            "stat",
            width=3,
        ),
        Panel("First token p95", "s", ((quantile(0.95, TTFT), "p95"),), kind="stat", width=3),
        Panel("Next token p50", "s", ((quantile(0.5, ITL), "p50"),), kind="stat", width=3),
        Panel(
            "Bandwidth used",
            "percentunit",
            ((UTILIZATION, "used"),),
            "Bytes that decoding had to read over its time, as a share of the bandwidth measured at start.",
            "stat",
            width=3,
        ),
        Panel(
            "KV cache live",
            "percentunit",
            ((f"avg(nybble_kv_usage_ratio{{{SELECTOR}}})", "live"),),
            kind="stat",
            width=3,
        ),
        Panel(
            "5xx answers",
            "percentunit",
            ((share(REFUSED, rate("nybble_http_requests_total")), "5xx"),),
            "Share of responses with a status of 500 and more.",
            "stat",
            width=3,
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel("Time to first token", "s", quantiles(TTFT)),
        Panel("Time to next token", "s", quantiles(ITL)),
        Panel("Whole request", "s", quantiles(WHOLE)),
        Panel(
            "Mean time per output token, by request",
            "s",
            quantiles("nybble_request_time_per_output_token_seconds"),
        ),
        Panel(
            "Where a request's time goes",
            "s",
            tuple(
                (mean(f"nybble_request_{phase}_seconds"), phase) for phase in ("queue", "prefill", "decode")
            ),
            "Mean seconds in each phase.",
            stacked=True,
        ),
        Panel("Waiting for the first step", "s", quantiles("nybble_request_queue_seconds")),
        Panel(
            "First token, distribution",
            "s",
            ((rate(TTFT + "_bucket", "le"), "{{le}}"),),
            kind="heatmap",
            width=12,
        ),
        Panel(
            "Next token, distribution",
            "s",
            ((rate(ITL + "_bucket", "le"), "{{le}}"),),
            kind="heatmap",
            width=12,
        ),
    ),
)

THROUGHPUT = Row(
    "Throughput",
    (
        Panel(
            "Tokens per second",
            "short",
            (
                (rate("nybble_prompt_tokens_total"), "in"),
                (rate("nybble_generation_tokens_total"), "out"),
            ),
        ),
        Panel(
            "Sequences",
            "short",
            ((now("nybble_requests_running"), "running"), (now("nybble_requests_waiting"), "waiting")),
        ),
        Panel(
            "How sequences end",
            "reqps",
            ((rate("nybble_requests_finished_total", "reason"), "{{reason}}"),),
            "stop and length are normal; abort: the client left; error: the sequence failed.",
            stacked=True,
        ),
        Panel(
            "Tokens per step",
            "short",
            ((share(rate("nybble_engine_step_tokens_total"), rate("nybble_engine_steps_total")), "tokens"),),
            "How well steps are filled.",
        ),
        Panel("Prompt length", "short", quantiles("nybble_request_prompt_tokens")),
        Panel("Answer length", "short", quantiles("nybble_request_generation_tokens")),
    ),
)

LIMITS = Row(
    "How close to the machine's limit",
    (
        Panel("Bandwidth used by decoding", "percentunit", ((UTILIZATION, "of the measured bandwidth"),)),
        Panel(
            "Bytes read by decoding, per second of decoding",
            "Bps",
            (
                (share(rate("nybble_decode_bytes_read_total"), rate("nybble_decode_seconds_total")), "read"),
                (f"avg(nybble_memory_bandwidth_bytes_per_second{{{SELECTOR}}})", "measured bandwidth"),
            ),
        ),
        Panel(
            "Decode step",
            "s",
            ((share(rate("nybble_decode_seconds_total"), rate("nybble_decode_steps_total")), "mean"),),
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        Panel(
            "KV blocks",
            "short",
            ((now("nybble_kv_blocks", "state"), "{{state}}"), (now("nybble_kv_pool_blocks"), "pool")),
            "live + cached + free = pool. Only live blocks belong to running sequences.",
            stacked=True,
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            (
                (
                    share(rate("nybble_prefix_hit_tokens_total"), rate("nybble_prefix_query_tokens_total")),
                    "hits",
                ),
            ),
            "Share of prompt tokens that were not computed again.",
        ),
        Panel("Preemptions", "ops", ((rate("nybble_preemptions_total"), "preemptions"),)),
        Panel("Weights by kind", "bytes", ((now("nybble_weight_bytes", "kind"), "{{kind}}"),), stacked=True),
        Panel(
            "Memory, planned and used",
            "bytes",
            (
                (now("nybble_memory_planned_bytes", "kind"), "{{kind}} planned"),
                (now("nybble_memory_used_bytes", "kind"), "{{kind}} used"),
            ),
        ),
        Panel("Process memory", "bytes", ((now("process_resident_memory_bytes"), "resident"),)),
    ),
)

HTTP = Row(
    "HTTP",
    (
        Panel(
            "Responses by status",
            "reqps",
            ((rate("nybble_http_requests_total", "status"), "{{status}}"),),
            stacked=True,
        ),
        Panel(
            "Responses by route",
            "reqps",
            ((rate("nybble_http_requests_total", "handler"), "{{handler}}"),),
            stacked=True,
        ),
        Panel("Mean duration", "s", ((mean("nybble_http_request_seconds"), "mean"),)),
    ),
)

SERVER = Row(
    "Server",
    (
        Panel("Model", "short", ((f"nybble_model_info{{{SELECTOR}}}", ""),), kind="table", width=12),
        Panel("Kernels", "short", ((f"nybble_kernels_info{{{SELECTOR}}}", ""),), kind="table", width=12),
        Panel("Start-up", "s", ((now("nybble_startup_seconds", "phase"), "{{phase}}"),), stacked=True),
        Panel("Logits that were not numbers", "ops", ((rate("nybble_nan_logits_total"), "NaN"),)),
        Panel(
            "Longest context", "short", ((now("nybble_model_context_tokens", "instance"), "{{instance}}"),)
        ),
    ),
)

ROWS = (OVERVIEW, LATENCY, THROUGHPUT, LIMITS, MEMORY, HTTP, SERVER)
