"""The GPU step against the reference decoder, for every family; in the interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble_kernels.activations import Activations, Kind
from nybble_kernels.float8 import Float8Tensor
from nybble_kernels.quantized import dense
from nybble_kernels.torch_cpu import quantize_rows
from nybble_kernels.triton.tiles import Tuning
from nybble_models.decoder import Decoder
from nybble_models.triton_memory import Cache, Sizes
from nybble_models.triton_step import Settings, TritonStep
from nybble_models.weights import Linear, Weights
from support_tiny import CONFIGS, tiny_spec, tiny_weights

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
TABLE = [5, 1, 7, 3]  # blocks in no order
LIMIT = {torch.float16: 3e-3, torch.bfloat16: 3e-2}  # relative RMSE of logits
ROUNDED = {"int": 3e-2, "float": 6e-2}  # where a few inputs round to other codes than those of float32 sums

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="Triton compiles, and there is no GPU"
)


def model(family: str, group_size: int | None = 64) -> tuple[Decoder, Weights]:
    """Two layers, no larger than a launch or two each: the interpreter is slow."""
    size = {"ffn_dim": 64} if family == "opt" else {"intermediate_size": 64}
    spec = tiny_spec(family, num_hidden_layers=2, **size)
    weights = tiny_weights(spec, group_size=group_size)
    return Decoder(spec, weights), weights


def step_of(
    decoder: Decoder,
    weights: Weights,
    dtype: torch.dtype = torch.float16,
    cache: torch.dtype | None = None,
) -> TritonStep:
    spec = decoder.spec
    head = weights.embed if weights.head is None else weights.head.weight
    tuning = Tuning.of_device(DEVICE)
    pdl = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9
    return TritonStep(
        spec,
        weights,
        weights.blocks,
        lambda: Cache.allocate(spec, 9, 16, cache or dtype, DEVICE),
        head,
        Settings(DEVICE, dtype, tuning, pdl),
        Sizes(batch=4, chunk=32, blocks=len(TABLE)),
    )


def tokens_of(count: int) -> Tensor:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(7))


def prefill(step: TritonStep, tokens: Tensor, start: int, table: Sequence[int] = TABLE) -> Tensor:
    count = len(tokens)
    step.scratch.tokens[:count] = tokens.to(DEVICE, torch.int32)
    step.scratch.positions[:count] = torch.arange(start, start + count)
    stream = step.prefill(count, start, torch.tensor(table, dtype=torch.int32, device=DEVICE))
    return torch.cat([part.clone() for part in step.score(stream, count)])


def decode(step: TritonStep, rows: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
    """Rows of (token, position, table)."""
    for row, (token, position, table) in enumerate(rows):
        step.scratch.tokens[row], step.scratch.positions[row] = token, position
        step.scratch.tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
    step.decode(len(rows))
    return step.scratch.logits[: len(rows)].clone()


def relative_rmse(found: Tensor, truth: Tensor) -> float:
    return float((found.cpu() - truth).norm() / truth.norm())


@pytest.mark.parametrize("family", CONFIGS)
def test_prompt_and_decode_match_the_reference(family: str) -> None:
    decoder, weights = model(family)
    tokens = tokens_of(22)
    truth = decoder.forward(tokens)
    step = step_of(decoder, weights)
    first = prefill(step, tokens[:20], 0)
    rest = [decode(step, [(int(tokens[p]), p, TABLE), (0, -1, [0])])[:1] for p in (20, 21)]
    assert relative_rmse(first, truth[:20]) < LIMIT[torch.float16]
    assert relative_rmse(torch.cat(rest), truth[20:]) < LIMIT[torch.float16]


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_bfloat16_and_8_bit_caches(cache: torch.dtype) -> None:
    decoder, weights = model("llama")
    tokens = tokens_of(10)
    truth = decoder.forward(tokens)
    step = step_of(decoder, weights, torch.bfloat16, cache)
    prefill(step, tokens[:9], 0)
    last = decode(step, [(int(tokens[9]), 9, TABLE)])
    limit = LIMIT[torch.bfloat16] * (3 if cache == torch.float8_e4m3fn else 1)
    assert relative_rmse(last, truth[9:]) < limit


def test_row_and_chunk_bits_do_not_depend_on_company() -> None:
    """A prompt cut anywhere and a row in any batch: the same bits."""
    decoder, weights = model("llama")
    tokens, other = tokens_of(20), tokens_of(7)
    whole, cut = step_of(decoder, weights), step_of(decoder, weights)
    together = prefill(whole, tokens[:19], 0)
    pieces = torch.cat([prefill(cut, tokens[:5], 0), prefill(cut, tokens[5:19], 5)])
    assert torch.equal(together, pieces)
    prefill(cut, other[:6], 0, [2, 4])
    alone = decode(whole, [(int(tokens[19]), 19, TABLE)])
    row = (int(tokens[19]), 19, TABLE)
    crowd = decode(cut, [(int(other[6]), 6, [2, 4]), row, (0, -1, [0])])
    assert torch.equal(alone[0], crowd[1])


def test_float_weights() -> None:
    decoder, weights = model("llama", None)
    tokens = tokens_of(6)
    step = step_of(decoder, weights)
    assert relative_rmse(prefill(step, tokens, 0), decoder.forward(tokens)) < LIMIT[torch.float16]


@pytest.mark.parametrize(
    ("family", "kind", "static", "launched"),
    [
        pytest.param("llama", "int", None, "w8a8", id="int"),
        pytest.param("llama", "int", 0.03, "w8a8", id="int-static"),
        pytest.param("llama", "float", None, "fp8", id="float"),
        pytest.param("llama", "float", 0.01, "fp8", id="float-static"),
        pytest.param("opt", "int", 0.03, "w8a8", id="int-static-opt"),
    ],
)
def test_8_bit_weights_and_inputs(family: str, kind: Kind, static: float | None, launched: str) -> None:
    """Every product rounds its input, that of `o` too, which no epilogue has measured.

    Static scales behind a LayerNorm are left for scales a row: there the reference rounds by the row too.
    """
    decoder, weights = model(family, None)
    for block in weights.blocks:
        for name, linear in block.linears.items():
            held = quantize_rows(dense(linear.weight), None) if kind == "int" else eights(linear.weight)
            block.linears[name] = Linear(held, linear.bias, Activations(kind, static))
    step = step_of(decoder, weights)
    assert {linear.kind for layer in step.layers for linear in layer.linears()} == {launched}
    if family == "opt":
        for block in weights.blocks:
            for name in ("q", "k", "v", "up"):
                block.linears[name].inputs = Activations(kind)
    tokens = tokens_of(6)
    truth = decoder.forward(tokens)
    assert relative_rmse(prefill(step, tokens[:5], 0), truth[:5]) < ROUNDED[kind]
    assert relative_rmse(decode(step, [(int(tokens[5]), 5, TABLE)]), truth[5:]) < ROUNDED[kind]


def eights(weight: Tensor) -> Float8Tensor:
    scales = weight.abs().amax(1, keepdim=True) / 448
    return Float8Tensor((weight / scales).to(torch.float8_e4m3fn), scales, weight.shape[1])


def test_8_bit_floats_without_rounded_inputs() -> None:
    """Rows with one scale are widened in the product; other groups are kept as 16 bits."""
    decoder, weights = model("llama", None)
    for block in weights.blocks:
        for name, linear in block.linears.items():
            held = eights(linear.weight)
            if name in ("o", "down"):
                held = Float8Tensor(held.values, held.scales.expand(-1, 2).contiguous(), 32)
            block.linears[name] = Linear(held, linear.bias)
    tokens = tokens_of(6)
    step = step_of(decoder, weights)
    assert {linear.kind for layer in step.layers for linear in layer.linears()} == {"fp8", "f16"}
    assert relative_rmse(prefill(step, tokens, 0), decoder.forward(tokens)) < LIMIT[torch.float16]


def test_act_order_and_mixed_kinds() -> None:
    """Permuted inputs of every linear, folded into the producer before `down`; gate and up of two kinds."""
    decoder, weights = model("llama")
    for block in weights.blocks:
        for name, linear in block.linears.items():
            generator = torch.Generator().manual_seed(len(name))
            order = torch.randperm(linear.weight.shape[1], generator=generator)
            block.linears[name] = Linear(replace(linear.weight, permutation=order), linear.bias)
        block.linears["up"] = Linear(block.linears["up"].weight.dequantize())
    tokens = tokens_of(6)
    step = step_of(decoder, weights)
    assert relative_rmse(prefill(step, tokens, 0), decoder.forward(tokens)) < LIMIT[torch.float16]
