"""The compiled decode step alone: milliseconds a step by batch and threads, beside what the memory gives.

    python benchmarks/step.py                the default model's shapes, random weights, 7 interleaved rounds
    python benchmarks/step.py --save         append the row to benchmarks/results/step.jsonl

Each round measures every case once, in turn. Medians over the rounds are printed with their ranges. PyTorch's
int4 op runs over the same matrices, linears and head only, without norms and attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nybble.bench.machine import facts
from nybble.engine.bandwidth import read_bandwidth
from nybble_kernels import torch_cpu
from nybble_kernels.numba.program import DecodeProgram
from nybble_kernels.quantized import QuantizedTensor
from nybble_models import paged
from nybble_models.decoder import Decoder
from nybble_models.program import build_program
from nybble_models.spec import ModelSpec
from nybble_models.weights import Block, Linear, Norm, Weights

SPEC = ModelSpec("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, rotary_theta=1e5, tied_head=True)
RESULTS = Path(__file__).parent / "results" / "step.jsonl"
LIMIT = 0.05  # relative RMSE of the logits against the reference decoder: the gate before any number


def random_tensor(outputs: int, inputs: int, bits: int, group: int) -> QuantizedTensor:
    groups = inputs // group
    top = 2**bits
    scales = (torch.rand(outputs, groups) + 0.5) * 4 / (top * inputs**0.5)
    zeros = torch.full((outputs, groups), top // 2, dtype=torch.uint8)
    codes = torch.randint(0, top, (outputs, inputs), dtype=torch.uint8)
    return QuantizedTensor(codes, scales.half().float(), bits, group, zeros=zeros)


def random_model(spec: ModelSpec) -> tuple[Weights, QuantizedTensor]:
    """4 bits in groups of 64, and an 8-bit head that is the embedding too."""

    def block() -> Block:
        linears = {p: Linear(random_tensor(*spec.shape(p), 4, 64)) for p in spec.projections}
        return Block(
            linears, {n: Norm(torch.rand(spec.hidden_size) + 0.5) for n in ("attention_norm", "mlp_norm")}
        )

    head = random_tensor(spec.vocab_size, spec.hidden_size, 8, 32)
    blocks = [block() for _ in range(spec.num_layers)]
    return Weights(head.dequantize(), None, blocks, Norm(torch.ones(spec.hidden_size)), None), head


class Stepper:
    """One program, and batches of it at a context."""

    def __init__(self, program: DecodeProgram, context: int, blocks: int) -> None:
        self.program, self.context = program, context
        per_row = context // 16 + 2
        self.tables = torch.randperm(blocks)[: program.max_batch * per_row].view(-1, per_row).int()
        self.logits = torch.empty(program.max_batch, SPEC.vocab_size)

    def milliseconds(self, batch: int, steps: int) -> float:
        """Median of `steps` steps."""
        tokens = torch.randint(0, SPEC.vocab_size, (batch,), dtype=torch.int32)
        seconds = []
        for step in range(steps):
            positions = torch.full((batch,), self.context + step % 16, dtype=torch.int32)
            started = time.perf_counter()
            self.program.step(tokens, positions, self.tables[:batch], self.logits[:batch])
            seconds.append(time.perf_counter() - started)
        return 1e3 * statistics.median(seconds)


def check(program: DecodeProgram, weights: Weights) -> float:
    """Error of one step's logits; raises when the numbers are wrong, for then no time means anything."""
    logits, token = torch.empty(1, SPEC.vocab_size), torch.tensor([123], dtype=torch.int32)
    program.step(token, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), logits)
    expected = Decoder(SPEC, weights).forward(token.long())
    error = float((logits - expected).norm() / expected.norm())
    if not error < LIMIT:
        raise SystemExit(f"the step is wrong: relative error {error:.3f}")
    return error


def torch_ops(weights: Weights, head: QuantizedTensor, threads: int) -> Callable[[int], float]:
    """Milliseconds of the same matrices on PyTorch's ops."""
    packed = [torch_cpu.pack(each.weight) for block in weights.blocks for each in block.linears.values()]
    one_scale = QuantizedTensor(head.codes, head.scales[:, :1].contiguous(), 8, SPEC.hidden_size)
    packed.append(torch_cpu.pack(one_scale))  # its int8 op takes one scale a row
    inputs = [each.weight.shape[1] for block in weights.blocks for each in block.linears.values()]
    inputs.append(SPEC.hidden_size)

    def milliseconds(steps: int) -> float:
        torch.set_num_threads(threads)
        rows = {k: torch.randn(1, k) for k in set(inputs)}
        seconds = []
        with torch.inference_mode():
            for _ in range(steps):
                started = time.perf_counter()
                for linear, k in zip(packed, inputs, strict=True):
                    linear(rows[k])
                seconds.append(time.perf_counter() - started)
        torch.set_num_threads(1)
        return 1e3 * statistics.median(seconds)

    return milliseconds


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds (or GB/s) of every case, a value a round."""
    torch.manual_seed(0)
    weights, head = random_model(SPEC)
    blocks = 17 * (arguments.context // 16 + 2)
    kv = paged.allocate(SPEC, blocks, 16)
    steppers = {}
    for threads in arguments.threads:
        program = build_program(
            SPEC,
            weights,
            kv,
            head=lambda: head,
            threads=threads,
            max_batch=max(arguments.batch),
            progress=print,
        )
        print(f"{program.isa}, {threads} threads: error {check(program, weights):.4f} against the reference")
        steppers[threads] = Stepper(program, arguments.context, blocks)
    ops = torch_ops(weights, head, max(arguments.threads))
    found: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for threads, stepper in steppers.items():
            for batch in arguments.batch:
                name = f"step, {threads} threads, batch {batch}"
                found.setdefault(name, []).append(stepper.milliseconds(batch, max(3, 24 // batch)))
            found.setdefault(f"read GB/s, {threads} threads", []).append(read_bandwidth(threads) / 1e9)
            found.setdefault(f"dequantize all, {threads} threads", []).append(dequantize_all(stepper.program))
        found.setdefault(f"torch int4 ops, {max(arguments.threads)} threads", []).append(ops(5))
    print(f"weights of a step: {sum(program.weight_bytes_per_step.values()) / 1e6:.1f} MB")
    return found


def dequantize_all(program: DecodeProgram) -> float:
    """Milliseconds to turn every linear into float32, layer by layer, as a prompt does."""
    names = ("qkv", "o", "gate_up", "down")
    out = {name: torch.empty(program.linear(0, name).shape) for name in names}
    started = time.perf_counter()
    for layer in range(SPEC.num_layers):
        for name in names:
            program.linear(layer, name).dequantize_into(out[name])
    return 1e3 * (time.perf_counter() - started)


def show(name: str, values: list[float]) -> str:
    middle = statistics.median(values)
    line = f"{name:34} {middle:8.2f}   {min(values):8.2f} to {max(values):8.2f}"
    if ", batch " in name:
        line += f"   {1e3 * int(name.rpartition(' ')[2]) / middle:7.0f} tokens/s"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments)
    print(f"{'':34} {'median':>8}   {'range':>20}   (ms unless said)")
    for name, values in found.items():
        print(show(name, values))
    if arguments.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps({"facts": facts(), "context": arguments.context, "rounds": found}) + "\n")


if __name__ == "__main__":
    main()
