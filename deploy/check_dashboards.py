"""Runs every query of the dashboard on a real Prometheus that scrapes a real server under load.

    python deploy/check_dashboards.py http://127.0.0.1:8000 --seconds 40

Exits 1 when a query fails, finds nothing, or finds no number. Needs the `prometheus` and `promtool` programs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPOSE = Path(__file__).parent / "compose"
DASHBOARD = COMPOSE / "grafana" / "dashboards" / "nybble.json"
STREAMS = 4
WINDOW = "30s"


class CheckFailed(Exception):
    """What is wrong, in one line."""


def expressions(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """(panel title, PromQL) of every target, with Grafana's variables filled in."""
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", WINDOW)
            found.append((panel["title"], re.sub(r"\$(job|instance)\b", ".*", text)))
    return found


def check(target: str, seconds: float, key: str | None) -> int:
    """Load the server, then ask everything. Returns the number of queries that passed."""
    tools()
    exposition(target, key)
    rules()
    with tempfile.TemporaryDirectory() as folder, prometheus(target, key, Path(folder)) as api:
        load(target, seconds, key)
        asked = expressions(json.loads(DASHBOARD.read_text(encoding="utf-8")))
        failures = [problem for title, text in asked if (problem := ask(api, title, text))]
    if failures:
        raise CheckFailed(f"{len(failures)} of {len(asked)} queries fail:\n  " + "\n  ".join(failures))
    return len(asked)


def tools() -> None:
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            raise CheckFailed(f"{program} is not installed (Debian: apt-get install prometheus)")


def exposition(target: str, key: str | None) -> None:
    """The page of metrics passes Prometheus' own linter."""
    page = fetch(f"{target}/metrics?aliases=0", key)
    result = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    if result.returncode:
        raise CheckFailed("promtool check metrics: " + (result.stderr or result.stdout).decode().strip())


def rules() -> None:
    result = subprocess.run(
        ["promtool", "check", "rules", str(COMPOSE / "alerts.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise CheckFailed("promtool check rules: " + (result.stderr or result.stdout).strip())


@contextmanager
def prometheus(target: str, key: str | None, folder: Path) -> Iterator[str]:
    """A Prometheus of our own on a free port; yields the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "prometheus.json"  # JSON is YAML
    config.write_text(json.dumps(scraping(target, key)), encoding="utf-8")
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            await_ready(f"http://{address}/-/ready", process, folder / "log")
            yield f"http://{address}/api/v1"
        finally:
            process.terminate()
            process.wait(timeout=10)


def scraping(target: str, key: str | None) -> dict[str, Any]:
    where = urllib.parse.urlsplit(target)
    job: dict[str, Any] = {
        "job_name": "nybble",
        "scheme": where.scheme,
        "static_configs": [{"targets": [where.netloc]}],
    }
    if key:
        job["authorization"] = {"credentials": key}
    return {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}


def await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            fetch(url, None)
            return
        except OSError:
            time.sleep(0.2)
    raise CheckFailed("prometheus does not start: " + log.read_text(encoding="utf-8")[-500:])


def load(target: str, seconds: float, key: str | None) -> None:
    """A few clients that chat; prompts repeat, so that the prefix cache has something to find."""
    model = json.loads(fetch(f"{target}/v1/models", key))["data"][0]["id"]
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            question = f"Write a few sentences about the number {turn % 3}. " * 4
            body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 16}
            fetch(f"{target}/v1/chat/completions", key, {**body, "stream": number % 2 == 0})

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(client, range(STREAMS)))


def ask(api: str, title: str, text: str) -> str | None:
    """What is wrong with the answer to this query, or None."""
    try:
        answer = json.loads(fetch(f"{api}/query?" + urllib.parse.urlencode({"query": text}), None))
    except urllib.error.HTTPError as error:
        return f"{title}: {error.read().decode(errors='replace')[:200]}: {text}"
    values = [float(row["value"][1]) for row in answer["data"]["result"]]
    if not values:
        return f"{title}: nothing found: {text}"
    return None if any(math.isfinite(value) for value in values) else f"{title}: no number: {text}"


def fetch(url: str, key: str | None, body: dict[str, Any] | None = None) -> bytes:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as response:
        content: bytes = response.read()
        return content


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to load the server")
    arguments = parser.parse_args()
    try:
        passed = check(arguments.target.rstrip("/"), arguments.seconds, os.environ.get("NYBBLE_API_KEY"))
    except CheckFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"all {passed} queries of the dashboard found numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
