"""Statistics, rows, table and aims of benchmarks/peers, on made-up rounds."""

from __future__ import annotations

from typing import Any

import pytest
from aims import aims
from comparison import aligned, ratio, row, spread, table
from measuring import Found
from subjects import Library, Server

LIBRARY = {"decode": [100.0, 200.0, 150.0], "prefill": [1000.0, 1100.0, 1200.0]}
BANDWIDTH = [30e9, 60e9, 45e9]


def library(name: str, peer: str, factor: float, **facts: Any) -> tuple[Library, Found]:
    rounds = {metric: [factor * value for value in values] for metric, values in LIBRARY.items()}
    return Library(name, peer, "/a/model.gguf", ()), Found(
        rounds, {"peak_mib": 200.0}, facts=facts, text="Paris"
    )


def server(name: str, peer: str, factor: float, streams: bool = True) -> tuple[Server, Found]:
    rounds = {"decode": [factor * value for value in LIBRARY["decode"]], "first_token_ms": [90 / factor] * 3}
    rounds |= {"streams": [2.5 * value for value in rounds["decode"]]} if streams else {}
    gaps = [0.01] * 95 + [0.03] * 5
    return Server(name, peer, "/a/folder/", (), {}), Found(rounds, {"start_s": 3.0 / factor}, gaps)


def rows(*subjects: tuple[Any, Found]) -> list[dict[str, Any]]:
    results = dict(subjects)
    return [row(subject, found, results, BANDWIDTH) for subject, found in results.items()]


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    assert spread([1.0, 9.0, 2.0], 1) == {"median": 2.0, "min": 1.0, "max": 9.0}
    assert ratio([100, 50, 90], [50, 25, 10]) == 2.0, "where the ratio of the medians is 3.6"


def test_a_row_has_medians_ranges_and_ratios() -> None:
    own, theirs = rows(
        library("nybble default", "nybble", 2, step_bytes=1e8), library("llama.cpp Q4_1", "llama.cpp", 1)
    )
    assert own["figures"]["decode"] == {"median": 300.0, "min": 200.0, "max": 400.0}
    assert own["rounds"]["decode"] == [200.0, 400.0, 300.0]
    assert own["of_read_bandwidth"] == pytest.approx(0.667, abs=1e-3)
    assert own["ours_to_this"] == {}, "itself"
    assert own["file"] == "model.gguf"
    assert "of_read_bandwidth" not in theirs
    assert theirs["ours_to_this"] == {"nybble default": {"decode": 2.0, "prefill": 2.0, "peak_mib": 1.0}}


def test_servers_are_compared_with_servers() -> None:
    found = rows(
        library("nybble default", "nybble", 2),
        server("nybble default", "nybble", 3),
        server("llama-server Q4_1", "llama.cpp", 1, streams=False),
    )
    assert found[2]["ours_to_this"] == {
        "nybble default": {"decode": 3.0, "first_token_ms": 0.333, "start_s": 0.333}
    }
    assert found[1]["streams_of_one"] == 2.5
    assert found[1]["gaps_ms"] == {"p50": 10.0, "p99": 30.0, "count": 100}
    assert found[2]["file"] == "folder"


def test_a_table_of_both_ways() -> None:
    lines = table(
        rows(
            library("nybble default", "nybble", 2),
            library("llama.cpp Q4_1", "llama.cpp", 1),
            server("nybble default", "nybble", 3),
            server("llama-cpp-python", "llama.cpp", 1, streams=False),
        )
    )
    assert lines[0].split() == ["library", "tokens/s", "prefill/s", "peak", "MiB"]
    assert lines[1].split() == ["nybble", "default", "300.0", "(200.0-400.0)", "2200", "(2000-2400)", "200"]
    assert (
        lines[3] == "  nybble default to llama.cpp Q4_1: tokens/s 2.00 x, prefill/s 2.00 x, peak MiB 1.00 x"
    )
    head = next(line for line in lines if line.startswith("server"))
    assert head.split() == ["server", "tokens/s", "first", "ms", "8", "streams", "start", "s"]
    assert next(line for line in lines if line.startswith("llama-cpp-python")).split()[-2:] == ["-", "3.00"]


def test_columns_are_aligned() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc   d"]


def test_aims_say_what_is_met() -> None:
    made = list(
        aims(
            rows(
                library("nybble default", "nybble", 2),
                library("llama.cpp Q4_1", "llama.cpp", 1.1),
                library("llama.cpp Q4_0", "llama.cpp", 1.2),
                library("openvino-genai Q4_1", "openvino", 9),
                server("nybble default", "nybble", 3),
                server("llama-server Q4_1", "llama.cpp", 1),
                server("llama-cpp-python", "llama.cpp", 1.2, streams=False),
            )
        )
    )
    assert [(aim.what, aim.met) for aim in made] == [
        ("decode to llama.cpp Q4_1", False),
        ("decode to llama.cpp Q4_0", True),
        ("decode to llama.cpp's fastest server", True),
        ("first token to llama.cpp's fastest server", True),
        ("99th percentile of gaps to their median", False),
        ("8 streams to one", False),
        ("seconds of the second start", True),
    ]
    assert str(made[0]) == "nybble default, library: decode to llama.cpp Q4_1 1.82 (at least 2): missed"
    assert made[2].value == pytest.approx(2.5), "the fastest server"


def test_random_weights_have_aims_of_their_own() -> None:
    own = library("nybble as it is", "nybble", 1, step_bytes=2.5e8)
    found = rows(own, library("llama.cpp Q4_1", "llama.cpp", 0.8))
    assert [(aim.what, aim.met) for aim in aims(found, random=True)] == [
        ("decode to llama.cpp Q4_1", True),
        ("decode to the read bandwidth", True),
    ]


def test_without_peers_there_is_nothing_to_compare_with() -> None:
    assert list(aims(rows(library("nybble default", "nybble", 2)))) == []
    whats = [aim.what for aim in aims(rows(server("nybble default", "nybble", 2)))]
    assert "decode to llama.cpp's fastest server" not in whats and len(whats) == 3
