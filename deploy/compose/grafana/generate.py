"""Writes dashboards/nybble.json from `panels.py`; `--check` fails when the file is stale.

Either way it fails when a panel asks for a metric that no code of nybble defines.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panels import ROWS, Panel, Row

from nybble.api import series

TARGET = Path(__file__).parent / "dashboards" / "nybble.json"
METRIC = re.compile(r"\b(?:nybble|process|python)_[a-z0-9_]+\b")
CLIENT_LIBRARY = frozenset({"process_resident_memory_bytes"})
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHTS = {"stat": 4, "timeseries": 8, "heatmap": 8, "table": 5}
COLUMNS = 24


def known_metrics() -> set[str]:
    """Every sample name that `/metrics` serves."""
    names = set(CLIENT_LIBRARY)
    for row in series.ALL:
        suffixes = ("_bucket", "_sum", "_count") if row.kind == "histogram" else ("",)
        names |= {row.name + suffix for suffix in suffixes}
    return names


def unknown_metrics() -> list[str]:
    """`panel: metric` for each metric that does not exist."""
    known = known_metrics()
    return [
        f"{panel.title}: {name}"
        for row in ROWS
        for panel in row.panels
        for expression, _ in panel.queries
        for name in METRIC.findall(expression)
        if name not in known
    ]


def dashboard() -> dict[str, Any]:
    return {
        "uid": "nybble",
        "title": "nybble",
        "description": "Latency, throughput, memory and the distance to the machine's limit.",
        "tags": ["llm", "nybble"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables()},
        "panels": list(placed()),
    }


def variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return [source, _variable("job", "nybble_ready"), _variable("instance", 'nybble_ready{job=~"$job"}')]


def placed() -> Iterator[dict[str, Any]]:
    """Panels with positions, each row under its title."""
    identifier, y = 0, 0
    for row in ROWS:
        identifier += 1
        yield _title(row, identifier, y)
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            identifier, height = identifier + 1, max(height, HEIGHTS[panel.kind])
            yield _panel(panel, identifier, {"x": x, "y": y, "w": panel.width, "h": HEIGHTS[panel.kind]})
            x += panel.width
        y += height


def _title(row: Row, identifier: int, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {
        "id": identifier,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": place,
        "panels": [],
    }


def _panel(panel: Panel, identifier: int, place: dict[str, int]) -> dict[str, Any]:
    shown = {
        "id": identifier,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": _custom(panel)}, "overrides": []},
        "targets": [_target(panel, *query, chr(ord("A") + at)) for at, query in enumerate(panel.queries)],
    }
    return shown | _options(panel)


def _target(panel: Panel, expression: str, legend: str, reference: str) -> dict[str, Any]:
    formats = {"heatmap": {"format": "heatmap"}, "table": {"format": "table", "instant": True}}
    target = {"refId": reference, "expr": expression, "legendFormat": legend, "datasource": SOURCE}
    return target | formats.get(panel.kind, {})


def _custom(panel: Panel) -> dict[str, Any]:
    if panel.kind != "timeseries":
        return {}
    mode = "normal" if panel.stacked else "none"
    return {"fillOpacity": 20 if panel.stacked else 5, "showPoints": "never", "stacking": {"mode": mode}}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"options": {"graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}}
    if panel.kind == "heatmap":
        return {"options": {"calculate": False, "yAxis": {"unit": panel.unit}}}
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
        return {"transformations": [{"id": "organize", "options": {"excludeByName": hidden}}]}
    return {
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    }


def _variable(label: str, source: str) -> dict[str, Any]:
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values({source}, {label})", "refId": label},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main(arguments: list[str]) -> int:
    if unknown := unknown_metrics():
        print("error: no code defines these metrics\n" + "\n".join(unknown), file=sys.stderr)
        return 1
    text = json.dumps(dashboard(), indent=2) + "\n"
    if "--check" not in arguments:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.read_text(encoding="utf-8") != text:
        print(f"error: {TARGET.name} is stale\nhint: run {Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
