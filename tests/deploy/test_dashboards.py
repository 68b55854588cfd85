"""The dashboard asks only for what exists, and a real Prometheus answers all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nybble.api import series
from support_process import ROOT, environment, fake_server

COMPOSE = ROOT / "deploy" / "compose"
GENERATE = COMPOSE / "grafana" / "generate.py"
CHECK = ROOT / "deploy" / "check_dashboards.py"
HAS_PROMETHEUS = shutil.which("prometheus") is not None and shutil.which("promtool") is not None
NAME = re.compile(r"\bnybble_[a-z0-9_]+")


def known_names() -> set[str]:
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {row.name + suffix for row in series.ALL for suffix in suffixes.get(row.kind, ("",))}


def python(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """As a user types it: a script finds the modules beside it, whatever runs these tests."""
    variables = environment(PYTHONSAFEPATH="", **extra)
    return subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=240
    )


def test_dashboard_is_current() -> None:
    result = python(str(GENERATE), "--check")
    assert result.returncode == 0, result.stderr


def test_generator_refuses_a_metric_that_does_not_exist(tmp_path: Path) -> None:
    for name in ("generate.py", "panels.py"):
        text = (GENERATE.parent / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("nybble_preemptions_total", "nybble_preemption_total"))
    result = python(str(tmp_path / "generate.py"))
    assert result.returncode == 1
    assert "Preemptions: nybble_preemption_total" in result.stderr


def test_alerts_ask_only_for_what_exists() -> None:
    groups = yaml.safe_load((COMPOSE / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    asked = {name for group in groups for rule in group["rules"] for name in NAME.findall(rule["expr"])}
    assert len(asked) > 5
    assert asked <= known_names()


def test_panels_do_not_overlap() -> None:
    panels = json.loads((COMPOSE / "grafana" / "dashboards" / "nybble.json").read_text(encoding="utf-8"))[
        "panels"
    ]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.skipif(not HAS_PROMETHEUS, reason="needs prometheus and promtool (Debian package prometheus)")
def test_prometheus_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    with fake_server(tmp_path) as address:
        result = python(str(CHECK), address, "--seconds", "8")
    assert result.returncode == 0, result.stderr + result.stdout
    assert re.search(r"all (\d+) queries", result.stdout)


@pytest.mark.skipif(not HAS_PROMETHEUS, reason="needs prometheus and promtool (Debian package prometheus)")
def test_a_query_that_finds_nothing_fails_the_check(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    stored = tmp_path / "deploy" / "compose" / "grafana" / "dashboards" / "nybble.json"
    stored.write_text(stored.read_text().replace("nybble_preemptions_total", "nybble_forgotten_total"))
    with fake_server(tmp_path / "model") as address:
        result = python(str(tmp_path / "deploy" / "check_dashboards.py"), address, "--seconds", "4")
    assert result.returncode == 1
    assert "Preemptions: nothing found" in result.stderr
