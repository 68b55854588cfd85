"""Names, values that move, and the page that describes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nybble.api import series
from nybble.api.metrics_table import page
from nybble.api.window import Window
from support_engine import FakeEngine, says
from support_http import Served

ALIASES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
    *(
        "generation_tokens_total",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
    ),
    *(
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
    ),
    *("request_time_per_output_token_seconds_count", "request_queue_time_seconds_count"),
    *("request_prefill_time_seconds_count", "request_decode_time_seconds_count"),
    *(
        "request_inference_time_seconds_count",
        "request_prompt_tokens_count",
        "request_generation_tokens_count",
    ),
    "iteration_tokens_total_count",
)
LABELS = '{engine="0",model_name="tiny"}'


def test_reference_page_is_current() -> None:
    written = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert written.read_text(encoding="utf-8") == page()


def test_every_series_is_served(served: Served, shared_engine: FakeEngine) -> None:
    served.post("/v1/completions", {"prompt": "a"})
    text = served.client.get("/metrics").text
    for row in series.ALL:
        assert f"# TYPE {row.name} {row.kind}\n" in text
        assert f"# HELP {row.name} {row.help}\n" in text


def test_values_move(served: Served, shared_engine: FakeEngine) -> None:
    shared_engine.script = says("abcd")
    samples = {
        "nybble_time_to_first_token_seconds_count": 1,
        "nybble_inter_token_latency_seconds_count": 3,
        "nybble_request_time_per_output_token_seconds_count": 1,
        "nybble_request_seconds_count": 1,
        "nybble_request_queue_seconds_count": 1,
        "nybble_request_prefill_seconds_sum": 0.002,
        "nybble_request_decode_seconds_sum": 0.003,
        "nybble_request_inference_seconds_sum": 0.005,
        "nybble_request_prompt_tokens_sum": 2,
        "nybble_request_generation_tokens_sum": 4,
        "nybble_prompt_tokens_total": 2,
        "nybble_generation_tokens_total": 4,
        "nybble_decode_bytes_read_total": 4 * 5_000_000,
        'nybble_requests_finished_total{reason="stop"}': 1,
        'nybble_requests_finished_total{reason="length"}': 0,
        'nybble_http_requests_total{handler="/v1/completions",method="POST",status="200"}': 1,
        'nybble_http_request_seconds_count{handler="/v1/completions",method="POST"}': 1,
        "vllm:generation_tokens_total" + LABELS: 4,
        "vllm:time_to_first_token_seconds_count" + LABELS: 1,
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}': 1,
    }
    served.post("/v1/completions", {"prompt": "a"})
    before = {name: served.metric(name) for name in samples}
    served.post("/v1/completions", {"prompt": "a"})
    assert {name: served.metric(name) - before[name] for name in samples} == pytest.approx(samples)


def test_aliases_can_be_left_out(served: Served) -> None:
    assert all(served.metric(f"vllm:{name}{LABELS}") >= 0 for name in ALIASES)
    facts = 'block_size="16",cache_dtype="float32",engine="0",model_name="tiny",num_gpu_blocks="64"'
    assert served.metric(f"vllm:cache_config_info{{{facts}}}") == 1
    assert "vllm:" not in served.client.get("/metrics?aliases=0").text


def test_facts(served: Served) -> None:
    assert served.metric('nybble_weight_bytes{kind="linear"}') == 500
    assert served.metric('nybble_memory_planned_bytes{kind="kv"}') == 400
    assert served.metric('nybble_memory_used_bytes{kind="weights"}') == 600
    assert served.metric('nybble_kv_blocks{state="free"}') == 64
    assert served.metric('nybble_startup_seconds{phase="weights"}') == 0.5
    assert served.metric('nybble_kernels_info{kernels="fake",phase="decode"}') == 1


def test_bandwidth_utilization(served: Served, shared_engine: FakeEngine) -> None:
    """The fake engine reads 5 MB in 10 ms, on a machine that could read 1 GB/s."""
    shared_engine.script = says("abcd")
    served.post("/v1/completions", {"prompt": "a"})
    assert served.metric("nybble_decode_bandwidth_utilization_ratio") == pytest.approx(0.5)


def test_client_cannot_make_up_series(served: Served) -> None:
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        served.client.request("GET", path)
    served.client.request("BREW", "/coffee")
    text = served.client.get("/metrics").text
    assert "/a" not in text and "coffee" not in text and "BREW" not in text
    assert 'handler="/v1/models/{name}"' in text or 'handler="/v1/models/{name:path}"' in text


def test_openmetrics_is_served_when_asked_for(served: Served) -> None:
    answer = served.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_our_names(served: Served) -> None:
    text = served.client.get("/metrics?aliases=0").text
    lines = [line for line in text.splitlines(keepends=True) if "nybble_" in line]
    subprocess.run(["promtool", "check", "metrics"], input="".join(lines), text=True, check=True)


def test_window_gives_the_recent_rate() -> None:
    times = iter((0.0, 1.0, 20.0, 21.0, 22.0, 90.0))
    window = Window(lambda: next(times))
    counters = ((10.0, 1.0), (10.0, 1.0), (40.0, 2.0), (40.0, 2.0), (40.0, 2.0))
    assert [window.rate(amount, seconds) for amount, seconds in counters] == [10.0, 10.0, 30.0, 30.0, 30.0]
