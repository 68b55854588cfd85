"""Norms, activations, embeddings, rotary positions and attention of the compiled step, against float64."""

from __future__ import annotations

import pytest
import torch

from nybble_kernels import reference
from nybble_kernels.numba.arena import Arena
from nybble_kernels.numba.builder import Attention
from nybble_kernels.numba.weight import hold
from nybble_models.rotary import rotary_table
from support_program import TOLERANCE, Cache, builder, error, fill, run, view
from support_quantized import quantized
from support_tiny import tiny_spec


@pytest.mark.parametrize("width", [8, 64, 100, 577])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_norms(width: int, kind: str) -> None:
    program = builder(rows=5)
    x, y = program.buffer(width), program.buffer(width)
    values, weight, bias = torch.randn(5, width) * 3 + 1, torch.randn(width), torch.randn(width)
    fill(x, values)
    program.norm(x, y, weight, bias if kind == "layer" else None, 1e-5, kind != "rms")
    run(program, 4)
    wide = values.double()
    if kind == "rms":
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    else:
        centred = wide - wide.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        expected = expected + bias if kind == "layer" else expected
    assert error(view(y)[:4], expected[:4]) < TOLERANCE["float32"]
    assert view(y)[4].isnan().all()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_activations(kind: str, gated: bool) -> None:
    width = 203
    program = builder(rows=3)
    x, y = program.buffer(2 * width if gated else width), program.buffer(width)
    values = torch.randn(3, x.width) * 6
    values[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-8, -30.0])
    fill(x, values)
    program.activate(x, y, kind, gated)
    run(program, 3)
    expected = reference.activation(values[:, :width], kind).double()
    if gated:
        expected = expected * values[:, width:]
    assert error(view(y), expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("table", ["bfloat16", "float32", "float16", "w8", "w4 odd"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned positions", "none"])
def test_embeddings(table: str, learned: bool) -> None:
    width = 64 if table != "w4 odd" else 50
    program = builder(rows=4)
    x = program.buffer(width)
    if table == "w8":
        packed = quantized(37, width, 8, 32, "symmetric")
        stored, rows = hold(packed, program.arena), packed.dequantize()
    elif table == "w4 odd":
        packed = quantized(37, width, 4, 25, "zeros")
        stored, rows = hold(packed, Arena(1 << 16)), packed.dequantize()
    else:
        stored = torch.randn(37, width, dtype=getattr(torch, table))
        rows = stored.float()
    positions = torch.randn(20, width) if learned else None
    program.embed(x, stored, positions, 2)
    tokens = torch.tensor([36, 0, 5, 36], dtype=torch.int32)
    places = Cache(
        torch.zeros(1, 1, 2, 1, 1, 1), torch.tensor([0, 1, 17, 3], dtype=torch.int32), torch.zeros(4, 1)
    )
    run(program, 4, tokens=tokens, cache=places)
    expected = rows[tokens.long()]
    if positions is not None:
        expected = expected + positions[places.positions.long() + 2]
    assert torch.equal(view(x), expected)


def scene(rows: int, shape: Attention, positions: list[int], page: int = 16, layers: int = 2) -> Cache:
    """A cache of NaN, and a shuffled table for each row."""
    blocks = max(positions) // page + 1
    kv = torch.full(
        (layers, rows * blocks + 1, 2, page, shape.kv_heads, shape.head_dim), float("nan")
    ).bfloat16()
    order = torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(3)) + 1
    tables = order.reshape(rows, blocks).int().contiguous()
    return Cache(kv, torch.tensor(positions, dtype=torch.int32), tables)


def held(cache: Cache, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, G, E] of a row, views where written through `store`."""
    pages = cache.kv[layer, cache.tables[row].long()]
    return pages[:, 0].flatten(0, 1), pages[:, 1].flatten(0, 1)


@pytest.mark.parametrize("head_dim", [8, 32, 80, 10])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 2), (7, 1), (2, 1)])
@pytest.mark.parametrize(("window", "threads"), [(None, 1), (5, 2), (33, 3), (None, 9)])
def test_attention(head_dim: int, heads: int, kv_heads: int, window: int | None, threads: int) -> None:
    shape = Attention(heads, kv_heads, head_dim, 0.3)
    positions = [0, 3, 16, 270, 600]
    cache = scene(5, shape, positions, page=8)
    for row, position in enumerate(positions):
        first = max(0, position - window + 1) if window else 0
        for p in range(first, position + 1):
            block = cache.tables[row, p // 8].long()
            cache.kv[1, block, :, p % 8] = torch.randn(2, kv_heads, head_dim).bfloat16()
    program = builder(rows=5, threads=threads)
    qkv, out = program.buffer((heads + 2 * kv_heads) * head_dim), program.buffer(heads * head_dim)
    values = torch.randn(5, qkv.width)
    fill(qkv, values)
    program.attend(qkv, out, shape, 1, window, length=608, page=8)
    run(program, 5, threads, cache=cache)
    for row, position in enumerate(positions):
        keys, contents = (t[: position + 1].float().nan_to_num() for t in held(cache, 1, row))
        query = values[row, : heads * head_dim].view(1, heads, head_dim)
        expected = reference.attention(query, keys, contents, position, 0.3, window).flatten()
        assert error(view(out)[row], expected) < TOLERANCE["float32"], (row, position)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_keys_and_values_go_into_their_slots(family: str) -> None:
    spec = tiny_spec(family)
    rotary = spec.positions == "rotary"
    cos, sin = rotary_table(spec, 80) if rotary else (None, None)
    shape = Attention(spec.num_heads, spec.num_kv_heads, spec.head_dim, 0.3, cos, sin)
    norms = [torch.randn(spec.head_dim) for _ in "qk"] if spec.qk_norm else [None, None]
    positions = [0, 17, 40]
    cache = scene(3, shape, positions)
    program = builder(rows=3)
    qkv = program.buffer((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    values = torch.randn(3, qkv.width)
    fill(qkv, values)
    program.place(qkv, shape, 1, *norms, 1e-6)
    run(program, 3, cache=cache)
    heads = values.view(3, -1, shape.head_dim)
    query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    if norms[0] is not None and norms[1] is not None:
        query, key = reference.rms_norm(query, norms[0], 1e-6), reference.rms_norm(key, norms[1], 1e-6)
    if cos is not None and sin is not None:
        query, key = (reference.rotary(t, cos[positions], sin[positions]) for t in (query, key))
    assert error(view(qkv)[:, : query[0].numel()], query.flatten(1)) < TOLERANCE["float32"]
    for row, position in enumerate(positions):
        keys, contents = held(cache, 1, row)
        assert error(keys[position], key[row]) < TOLERANCE["bfloat16 cache"]
        assert torch.equal(contents[position], value[row].bfloat16())
    assert int((~cache.kv.isnan()).sum()) == 3 * 2 * shape.kv_heads * shape.head_dim


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    shape = Attention(1, 1, 8, 1.0)
    cache = scene(1, shape, [0])
    program = builder(rows=1)
    qkv = program.buffer(24)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, -0x40808001, 0, -0x80000000, 1])
    values = bits.to(torch.int32).view(torch.float32)
    fill(qkv, values.repeat(3)[None])
    program.place(qkv, shape, 0, None, None, 1e-6)
    run(program, 1, cache=cache)
    stored = cache.kv[0, int(cache.tables[0, 0]), :, 0, 0]
    assert torch.equal(stored[0].view(torch.int16), values.bfloat16().view(torch.int16))
    assert torch.equal(stored[1].view(torch.int16), values.bfloat16().view(torch.int16))
