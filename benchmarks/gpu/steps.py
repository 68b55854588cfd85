"""Part 4: whole decode steps and prompts of models with random weights, on one captured graph each.

    python benchmarks/gpu/steps.py
    python benchmarks/gpu/steps.py --models Llama-2-7B --kinds W4A16

A step is all launches from the token to the next one, the draw included. Its bytes are those of its weights
and of the keys and values it reads.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from clock import Call, Chain, chain, interleaved
from kernel_times import kernel_times
from part import Part, begin, missing, parser
from random_models import BLOCK_SIZE, KINDS, Model
from rows import spread
from shapes import MODELS
from warm import share, warm

ORDER = (
    ("Llama-2-7B", "W4A16"),
    ("Llama-2-7B", "W8A8"),
    ("Llama-3.1-8B", "W4A16"),
    ("Llama-2-7B", "fp16"),
    ("Llama-2-13B", "W4A16"),
    ("Llama-3.1-8B", "W8A8"),
    ("Llama-2-13B", "W8A8"),
    ("Llama-3.1-8B", "fp16"),
    ("Llama-2-13B", "fp16"),
)
CONTEXTS = (0, 2048, 8192)
PROMPTS = (512, 2048)
ROUNDS = 7


def decode(part: Part, model: Model) -> None:
    """Tokens per second at every context, with overlapping launches and without, in turn."""
    overlaps = (False,) if part.dry else (False, True)
    for context in (0,) if part.dry else CONTEXTS:
        chains: dict[str, Chain] = {}
        for pdl in overlaps:
            model.at(context, pdl)
            chains[str(pdl)] = chain([model.step] * (1 if part.dry else 4), part.device)
        for pdl, samples in interleaved(chains, 1 if part.dry else ROUNDS).items():
            write_decode(part, model, context, pdl == "True", samples)
        if part.left() < 0:
            return


def write_decode(part: Part, model: Model, context: int, pdl: bool, us: list[float]) -> None:
    moved = model.bytes_at(context)
    rates = spread([1e6 / each for each in us], 1)
    bandwidth = spread([moved / each / 1e3 for each in us], 1)
    part.rows.write(
        phase="decode",
        model=model.name,
        kind=model.kind,
        context=context,
        batch=1,
        overlap=pdl,
        us=spread(us),
        tokens_per_s=rates,
        bytes=moved,
        gb_per_s=bandwidth,
        of_read_bandwidth=part.share(bandwidth["median"]),
    )
    how = ", overlap" if pdl else ""
    part.tell(f"{model.name} {model.kind} context {context}{how}: {rates['median']:.0f} tokens/s")


def prompts(part: Part, model: Model) -> None:
    for tokens in (16,) if part.dry else PROMPTS:
        model.at(0, not part.dry)
        model.begin_prompt(tokens)
        calls: list[Call] = [lambda tokens=tokens: model.prompt(tokens)]  # type: ignore[misc]
        samples = interleaved({"": chain(calls, part.device)}, 1 if part.dry else ROUNDS)[""]
        rates = spread([1e6 * tokens / us for us in samples], 1)
        part.rows.write(
            phase="prefill",
            model=model.name,
            kind=model.kind,
            tokens=tokens,
            us=spread(samples),
            tokens_per_s=rates,
        )
        part.tell(f"{model.name} {model.kind} prompt of {tokens}: {rates['median']:.0f} tokens/s")


def measure(part: Part, name: str, kind: str) -> None:
    context = 16 if part.dry else max(CONTEXTS)
    part.mark(f"{name} {kind}")
    try:
        model = Model(name, kind, part.device, context, 16 if part.dry else max(PROMPTS))
        model.at(0, False)
        model.check()
        decode(part, model)
        if part.left() > 0:
            prompts(part, model)
        for each in () if part.dry else CONTEXTS:
            model.at(each, False)  # with overlap, waiting would count twice
            times = kernel_times(chain([model.step], part.device))
            part.rows.write(phase="kernels", model=name, kind=kind, context=each, kernels=times)
    except Exception as reason:  # one model that fails must not end the others
        if not part.alive():
            raise  # the gate starts again without this model
        part.lacks(f"{name} {kind}", f"{type(reason).__name__}: {str(reason)[:200]}")
    part.mark(None)


def release() -> None:
    """Give the last model's memory back before the next one is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def jobs(part: Part) -> Iterator[tuple[str, str]]:
    if part.dry:
        yield "tiny", "W4A16"
        return
    done = {(row["model"], row["kind"]) for row in part.rows.written() if row.get("phase") == "prefill"}
    for name, kind in ORDER:
        wanted = name in part.arguments.models and kind in part.arguments.kinds
        if wanted and (name, kind) not in done and f"{name} {kind}" not in part.arguments.without:
            yield name, kind


def compile_ahead(part: Part, which: str) -> None:
    """A worker of `warm`: the same kernels, of one layer."""
    for name, kind in share(list(jobs(part)), which):
        with contextlib.suppress(Exception):
            MODELS[name] = replace(MODELS[name], num_layers=1)
            model = Model(name, kind, part.device, BLOCK_SIZE, max(PROMPTS))
            for pdl, context in itertools.product((False, True), CONTEXTS[:1]):
                model.at(context, pdl)
                model.step()
            for tokens in PROMPTS:
                model.begin_prompt(tokens)
                model.prompt(tokens)


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--models", nargs="+", default=sorted({name for name, _ in ORDER}), choices=MODELS)
    found.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    found.add_argument("--without", nargs="*", default=[], help='models to leave out, as "Llama-2-7B W4A16"')
    found.add_argument("--warm", help="compile the share i/n of the kernels and measure nothing")
    return found.parse_args()


def unavailable() -> str | None:
    if absent := missing("triton"):
        return f"{', '.join(absent)} not installed"
    try:
        import nybble_models.triton_step  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def main() -> int:
    part = begin("steps", arguments())
    if reason := unavailable():
        part.lacks("steps", reason)
        return 3
    if part.arguments.warm:
        compile_ahead(part, part.arguments.warm)
        return 0
    todo = list(jobs(part))
    if not part.dry:
        chosen = ["--models", *part.arguments.models, "--kinds", *part.arguments.kinds]
        warm(part, Path(__file__), len(todo), chosen, 0.3 * part.left())
    left: list[Any] = []
    for name, kind in todo:
        if part.left() > 0:
            measure(part, name, kind)
            release()
        else:
            left.append(f"{name} {kind}")
    if left:
        part.lacks(f"{len(left)} models", f"out of time before {left[0]}")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
