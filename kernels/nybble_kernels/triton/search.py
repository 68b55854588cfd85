"""Which cut of a product is fastest here: every candidate in turn over the same weights, the median kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from nybble_kernels.triton.epilogue import Store, make_operand
from nybble_kernels.triton.linear import DeviceLinear
from nybble_kernels.triton.tiles import Cut, Phase, Workspace

ROWS: dict[Phase, tuple[int, ...]] = {"decode": (1, 16), "prefill": (512,)}
"""Rows that a cut is judged by: it serves every batch of its phase."""

SMALLEST_PART = 256  # inputs


def candidates(kind: str, inputs: int, phase: Phase) -> Iterator[Cut]:
    """Cuts worth trying. Prefill keeps K whole: its tiles are many, and its sums must not depend on them."""
    if phase == "prefill":
        yield from (Cut(warps, 1, 1, stages) for warps in (4, 8) for stages in (1, 2, 3))
        return
    splits = [s for s in (1, 2, 4, 8, 16) if s == 1 or inputs // s >= SMALLEST_PART]
    yield from (
        Cut(warps, split, unroll, stages)
        for warps in (4, 8)
        for split in splits
        for unroll, stages in ((1, 1), (2, 1), (1, 3), (2, 3))
    )
    if kind == "w8a8":
        yield from (Cut(warps, split, 2, 3, single=True) for warps in (4, 8) for split in splits)


def fastest(
    linear: DeviceLinear, phase: Phase, dtype: torch.dtype, *, copies: int = 1, rounds: int = 5
) -> tuple[Cut, dict[Cut, float]]:
    """The best cut of a product, and the seconds of all that ran.

    A candidate must agree with the default cut. `copies` of the weight are read in turn, enough of them that
    none is in a cache when its turn comes. Raises `RuntimeError` where not even the default runs.
    """
    device = linear.device
    chain = [linear, *(linear.copy() for _ in range(copies - 1))]
    runs: dict[Cut, list[Callable[[], None]]] = {}
    for cut in dict.fromkeys([linear.cuts[phase], *candidates(linear.kind, linear.inputs, phase)]):
        try:
            runs[cut] = [_run(chain, cut, phase, rows, dtype, device) for rows in ROWS[phase]]
        except Exception:  # too large for this GPU: no candidate
            continue
    if not runs:
        raise RuntimeError(f"no cut of {linear.outputs} x {linear.inputs} runs on this device")
    times: dict[Cut, list[list[float]]] = {cut: [[] for _ in each] for cut, each in runs.items()}
    for _ in range(rounds):
        for cut, each in runs.items():
            for samples, run in zip(times[cut], each, strict=True):
                samples.append(_seconds(run, device))
    means = {
        cut: statistics.geometric_mean(statistics.median(samples) for samples in each)
        for cut, each in times.items()
    }
    return min(means, key=lambda cut: means[cut]), means


def _run(
    chain: list[DeviceLinear], cut: Cut, phase: Phase, rows: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Launches the chain cut like this, once it was seen to be right."""
    first = chain[0]
    operand = make_operand(rows, first.inputs, 64, dtype, device)
    operand.values.normal_()
    operand.stats[2] = operand.values.abs().amax().float()
    tried = [replace(each, cuts={**each.cuts, phase: cut}) for each in chain]
    tile = tried[0].tile(rows, phase)
    workspace = Workspace.allocate([(tile, first.outputs, rows)], device)
    output = Store(torch.empty(rows, first.outputs, device=device))

    def run() -> None:
        for linear in tried:
            linear(operand, rows, output, phase, workspace)

    run()
    found = output.y.clone()
    chosen = first.tile(rows, phase)
    first(operand, rows, output, phase, Workspace.allocate([(chosen, first.outputs, rows)], device))
    if not float((found - output.y).norm()) <= 1e-3 * float(output.y.norm()):
        raise ValueError(f"{cut} gives other numbers")
    return _captured(run) if device.type == "cuda" else run


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(held: Callable[[], None] = run) -> None:  # a graph keeps no tensor alive: `run` has them
        graph.replay()

    return replay


def _seconds(run: Callable[[], None], device: torch.device, repeats: int = 3) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats
