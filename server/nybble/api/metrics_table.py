"""`python -m nybble.api.metrics_table > docs/metrics.md` writes the reference page from `series`."""

from __future__ import annotations

import sys

from nybble.api import series

_HEAD = """# Metrics

`GET /metrics` serves these series, generated from `nybble/api/series.py`
(`python -m nybble.api.metrics_table > docs/metrics.md`; a test keeps this page current).

Those with an alias are served a second time as `vllm:<alias>` with the labels `model_name` and `engine`,
so that existing dashboards and autoscalers work; `/metrics?aliases=0` leaves the aliases out. Two more
exist only under such a name: `vllm:iteration_tokens_total` (sum and count of tokens per step) and
`vllm:cache_config_info` (block size and number of blocks). `process_*` and `python_*` are those of the
Prometheus client library.

| series | type | labels | meaning | alias |
|---|---|---|---|---|
"""


def page() -> str:
    return _HEAD + "".join(_row(row) for row in series.ALL) + _buckets()


def _row(row: series.Series) -> str:
    labels = ", ".join(f"`{label}`" for label in row.labels)
    alias = f"`{row.alias}`" if row.alias else ""
    return f"| `{row.name}` | {row.kind} | {labels} | {row.help} | {alias} |\n"


def _buckets() -> str:
    lines = [
        f"- `{row.name}`: " + " ".join(f"{edge:g}" for edge in row.buckets)
        for row in series.ALL
        if row.buckets
    ]
    return "\nBuckets:\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
