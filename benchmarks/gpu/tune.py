"""Part 6, on request: cut every product of every known model each way, and write the table of this GPU.

    python benchmarks/gpu/gate.py --tune          writes kernels/nybble_kernels/tuned/<gpu>.json

`nybble tune` does the same for one model; both use `nybble_kernels.triton.search`. The file is written after
every product, here and beside the rows: a sweep that is cut off is still of use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import paths
import torch
from clock import copies
from part import Part, begin, missing, parser
from random_models import random_weight
from shapes import MODELS, TINY, linears
from warm import share, warm

FOLDER = paths.ROOT / "kernels" / "nybble_kernels" / "tuned"
PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Product:
    kind: str  # of random_models.KINDS
    outputs: int
    inputs: int
    phase: str


def products(arguments: argparse.Namespace) -> list[Product]:
    """Decode before prefill, 4 bits before 8; heads are of 8 or 16 bits, other matrices of 4 or 8."""
    if arguments.dry:
        return [Product("W4A16", *linears(TINY)["o"], "decode")]
    shapes = [each for name in arguments.models for each in linears(MODELS[name]).items()]
    matrices = dict.fromkeys(shape for name, shape in shapes if name != "head")
    heads = dict.fromkeys(shape for name, shape in shapes if name == "head")
    return [
        Product(kind, *shape, phase)
        for phase in PHASES
        for kind, which in (("W4A16", matrices), ("fp16", heads), ("W8A8", matrices), ("W8A8", heads))
        for shape in which
    ]


def made(product: Product, device: str, tuning: Any) -> Any:
    from nybble_kernels.activations import Activations
    from nybble_kernels.triton.linear import make_linear

    weight = random_weight(product.outputs, product.inputs, product.kind, device)
    rounded = Activations() if product.kind == "W8A8" else None
    return make_linear(weight, None, dtype=torch.bfloat16, tuning=tuning, inputs=rounded)


def run(part: Part) -> None:
    from nybble_kernels.triton.search import fastest
    from nybble_kernels.triton.tiles import Tuning, key

    tuning = Tuning.of_device(torch.device(part.device))
    todo = products(part.arguments)
    for number, product in enumerate(todo):
        if part.left() < 0:
            part.lacks(f"{len(todo) - number} products", f"out of time before {product}")
            return
        linear = made(product, part.device, tuning)
        count = copies(linear.nbytes, part.rows.facts["l2_bytes"])
        rounds = 1 if part.dry else 5
        best, times = fastest(linear, product.phase, torch.bfloat16, copies=count, rounds=rounds)
        name = key(linear.kind, linear.outputs, linear.inputs, product.phase)
        tuning = replace(tuning, cuts={**tuning.cuts, name: best})
        save(part, tuning)
        us = round(1e6 * times[best] / count, 3)
        part.rows.write(product=asdict(product), best=asdict(best), us=us, tried=len(times))
        part.say(f"{name}: {best}" + ("" if part.dry else f", {us:.1f} us, the best of {len(times)}"))


def save(part: Part, tuning: Any) -> None:
    """Beside the rows, and into the package unless the run was a dry one."""
    from nybble_kernels.triton.tiles import file_name

    device = part.rows.facts["device"]
    text = json.dumps(replace(tuning, device=device).as_json(), indent=1) + "\n"
    for folder in (part.arguments.out, *(() if part.dry else (FOLDER,))):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file_name(device)).write_text(text, encoding="utf8")


def compile_ahead(part: Part, which: str) -> None:
    """A worker of `warm`: one round over one copy compiles what the sweep will launch."""
    from nybble_kernels.triton.search import fastest
    from nybble_kernels.triton.tiles import Tuning

    tuning = Tuning.of_device(torch.device(part.device))
    for product in share(products(part.arguments), which):
        with contextlib.suppress(Exception):
            fastest(made(product, part.device, tuning), product.phase, torch.bfloat16, copies=1, rounds=1)


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    found.add_argument("--warm", help="compile the share i/n of the kernels and measure nothing")
    return found.parse_args()


def main() -> int:
    part = begin("tune", arguments())
    if absent := missing("triton"):
        part.lacks("tune", f"{', '.join(absent)} not installed")
        return 3
    if part.arguments.warm:
        compile_ahead(part, part.arguments.warm)
        return 0
    if not part.dry:
        flags = ["--models", *part.arguments.models]
        warm(part, Path(__file__), len(products(part.arguments)), flags, 0.5 * part.left())
    run(part)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
