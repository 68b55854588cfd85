"""The tables of docs/kernels.md, from rows; a cell without rows says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cases import MODEL_ORDER, ROW_ORDER
from goals import NO_ROWS, verdicts
from results import Results
from rows import Row
from shapes import BITS, MODELS, linears, token_bytes

BATCHES = sorted(m for tier in ROW_ORDER for m in tier)
STEP_MODELS = ("Llama-2-7B", "Llama-2-13B", "Llama-3.1-8B")
CONTEXTS = (0, 2048, 8192)
PROMPTS = (512, 2048)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(devices: list[Results]) -> str:
    return markdown(("goal", "GPU", "target", "measured", "met"), verdicts(devices))


def machine(devices: list[Results]) -> str:
    """Bandwidths and launch gaps; one column a device."""

    def cell(found: Results, subject: str, field: str) -> str:
        row = found.one("ceilings", subject=subject)
        return f"{row[field]['median']:g}" if row else NO_ROWS

    lines = (
        ("read bandwidth, GB/s", "read", "gb_per_s"),
        ("device copy, read + written, GB/s", "copy", "gb_per_s"),
        ("empty launch in a graph, µs", "empty", "us"),
        ("the same, overlapping", "empty with overlap", "us"),
        ("9 MB read in a chain, GB/s", "read 9 MB", "gb_per_s"),
        ("the same, overlapping", "read 9 MB with overlap", "gb_per_s"),
    )
    return markdown(
        ("", *(d.device for d in devices)),
        [(text, *(cell(d, subject, field) for d in devices)) for text, subject, field in lines],
    )


def kernels(found: Results, kind: str, peers: tuple[str, ...]) -> str:
    """Of each shape and batch: µs, share of the read bandwidth, and how much faster than the fastest peer."""

    def cell(model: str, projection: str, m: int) -> str:
        rows = found.part("linears", model=model, projection=projection, m=m)
        ours = [r for r in rows if r["ours"] and r["kind"] == kind]
        if not ours:
            return NO_ROWS
        best = min(ours, key=lambda r: r["us"]["median"])
        text = f"{best['us']['median']:.1f}"
        if found.bandwidth and m <= 64:
            text += f" ({best['gb_per_s']['median'] / found.bandwidth:.0%})"
        beside = [r["us"]["median"] for r in rows if not r["ours"] and r["kind"] in peers]
        return text + (f" {min(beside) / best['us']['median']:.2f}x" if beside else "")

    body = [
        (f"{model} {projection}", f"{n} x {k}", *(cell(model, projection, m) for m in BATCHES))
        for model in MODEL_ORDER
        for projection, (n, k) in linears(MODELS[model]).items()
    ]
    return markdown(("matrix", "N x K", *(f"M = {m}" for m in BATCHES)), body)


def decode(devices: list[Results]) -> str:
    """Tokens per second at batch 1, and the share of what the read bandwidth would give."""

    def cell(found: Results, **case: object) -> str:
        rows = found.part("steps", phase="decode", batch=1, **case)
        if not rows:
            return NO_ROWS
        best = max(rows, key=lambda r: r["tokens_per_s"]["median"])
        return f"{best['tokens_per_s']['median']:.0f}{share(found, best)}{found.marked('steps')}"

    body = []
    for model in STEP_MODELS:
        for kind in BITS:
            for context in CONTEXTS:
                gigabytes = token_bytes(MODELS[model], BITS[kind], context) / 1e9
                rates = (cell(d, model=model, kind=kind, context=context) for d in devices)
                body.append((model, kind, str(context), f"{gigabytes:.2f}", *rates))
    return markdown(("model", "weights", "context", "GB a token", *(d.device for d in devices)), body)


def share(found: Results, row: Row) -> str:
    return f" ({row['gb_per_s']['median'] / found.bandwidth:.0%})" if found.bandwidth else ""


def prefill(devices: list[Results]) -> str:
    def cell(found: Results, **case: object) -> str:
        row = found.one("steps", phase="prefill", **case)
        return f"{row['tokens_per_s']['median']:.0f}{found.marked('steps')}" if row else NO_ROWS

    body = [
        (model, kind, str(tokens), *(cell(d, model=model, kind=kind, tokens=tokens) for d in devices))
        for model in STEP_MODELS
        for kind in BITS
        for tokens in PROMPTS
    ]
    return markdown(("model", "weights", "prompt tokens", *(d.device for d in devices)), body)


def step_kernels(devices: list[Results]) -> str:
    """Where a step of Llama-2-7B in W4A16 spends its time."""
    lines: list[tuple[str, ...]] = []
    for found in devices:
        rows = found.part("steps", phase="kernels", model="Llama-2-7B", kind="W4A16")
        lines += [
            (found.device, str(row["context"]), name, f"{each['calls']:g}", f"{each['us']:.1f}")
            for row in rows
            for name, each in row["kernels"].items()
        ] or [(found.device, "", NO_ROWS, "", "")]
    return markdown(("GPU", "context", "kernel and its grid", "launches a step", "µs a step"), lines)


def http(devices: list[Results]) -> str:
    def cells(found: Results) -> tuple[str, ...]:
        row = found.one("over_http")
        if row is None:
            return (NO_ROWS,) * 3
        return (
            f"{row['in_process']['median']:.0f}{found.marked('over_http')}",
            f"{row['over_http']['median']:.0f}",
            f"{row['of_in_process']['median']:.3f}",
        )

    head = ("GPU", "in process, tokens/s", "over HTTP, tokens/s", "ratio")
    return markdown(head, [(d.device, *cells(d)) for d in devices])


def origin(devices: list[Results]) -> str:
    """What was measured, where and when."""
    fields = ("commit", "torch", "triton", "driver")
    lines = [
        (found.device, *(str(each) for each in row))
        for found in devices
        for row in sorted({(*(r[f] for f in fields), r["when"][:10]) for r in found.rows}, key=str)
    ]
    lines += [(found.device, NO_ROWS, "", "", "", "") for found in devices if not found.rows]
    return markdown(("GPU", *fields, "date"), lines)


def all_kernels(devices: list[Results], kind: str, peers: tuple[str, ...]) -> str:
    """A table for every device with rows; one empty table where there is none."""
    seen = [d for d in devices if d.part("linears")]
    parts = [f"{d.device}{d.marked('linears')}\n\n{kernels(d, kind, peers)}" for d in seen]
    return "\n\n".join(parts) or kernels(devices[0], kind, peers)


def sections(devices: list[Results]) -> dict[str, str]:
    """Every generated section of the page, by the name in its markers."""
    return {
        "goals": goals(devices),
        "origin": origin(devices),
        "machine": machine(devices),
        "W4A16": all_kernels(devices, "W4A16", ("W4A16", "16-bit")),
        "W8A8": all_kernels(devices, "W8A8", ("W8A8", "fp8")),
        "decode": decode(devices),
        "step kernels": step_kernels(devices),
        "prefill": prefill(devices),
        "http": http(devices),
    }
