"""Every kernel's launches at the shapes of real models, with the limits their machine code has to keep.

Each case calls an op as the engine does, on tensors without storage: tiles, types and constants are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aot_shapes import (
    BATCH,
    CHUNK,
    LLAMA2_7B,
    LLAMA3_8B,
    META,
    OPT_7B,
    QWEN2_7B,
    Model,
    angles,
    bytes_packed,
    cache,
    floats,
    gated,
    ints,
    meta,
    operand,
    packed,
    quantized,
    residual,
    stored,
)
from nybble_kernels.triton import attention_decode as decoding
from nybble_kernels.triton.activation import activation
from nybble_kernels.triton.attention_prefill import attention_prefill
from nybble_kernels.triton.embed import embed
from nybble_kernels.triton.epilogue import Output
from nybble_kernels.triton.linear_f16 import linear_f16
from nybble_kernels.triton.linear_w4a16 import linear_w4a16
from nybble_kernels.triton.linear_w8a8 import linear_w8a8
from nybble_kernels.triton.norm import norm
from nybble_kernels.triton.packing import PackedWeight
from nybble_kernels.triton.packing8 import Packed8
from nybble_kernels.triton.quantize import norm_quantize, quantize_operand
from nybble_kernels.triton.rotary import rotary
from nybble_kernels.triton.sample import sample
from nybble_kernels.triton.sample_state import SampleState
from nybble_kernels.triton.tiles import Phase, Tile, Tuning, Workspace
from support_aot import ARCHS, Case, Limits

PROCESSORS = 132


def linear(
    weight: PackedWeight | Packed8 | Tensor,
    output: Output,
    pdl: bool,
    *,
    rows: int = 1,
    phase: Phase = "decode",
    dtype: torch.dtype = torch.float16,
    norm: str | None = None,
    once: bool = False,
    tile: Tile | None = None,
    **folded: Tensor,
) -> None:
    """The op of the weight's kind, cut as on a GPU that was never tuned. `once`: x comes quantized."""
    kind, op, outputs, inputs = of_kind(weight)
    tile = tile or Tuning().cut(kind, outputs, inputs, phase).tile(rows, phase)
    workspace = Workspace.allocate([(tile, outputs, rows)], META)
    x = quantized(inputs, weight.values.dtype, norm) if once else operand(inputs, dtype, norm)
    op(x, rows, weight, output, tile, workspace, pdl=pdl, **folded)


def of_kind(weight: PackedWeight | Packed8 | Tensor) -> tuple[str, Callable[..., None], int, int]:
    """(name of its cuts, its op, outputs, inputs)."""
    if isinstance(weight, Tensor):
        return "f16", linear_f16, *weight.shape
    if isinstance(weight, Packed8):
        kind = "w8a8" if weight.values.dtype == torch.int8 else "fp8"
        return kind, linear_w8a8, weight.outputs, weight.inputs
    return f"w{weight.bits}a16", linear_w4a16, weight.outputs, weight.inputs


def qkv(m: Model, bits: int, pdl: bool, *, norm: str = "rms", **settings: Any) -> None:
    linear(packed(m.qkv, m.hidden, bits), stored(m.qkv), pdl, norm=norm, **settings)


def layer_norm(m: Model, pdl: bool) -> None:
    qkv(m, 4, pdl, norm="layer", bias=meta(m.qkv), colsum=meta(m.qkv))


def o(m: Model, pdl: bool) -> None:
    linear(packed(m.hidden, m.hidden), residual(m.hidden), pdl)


def gate_up(m: Model, bits: int, pdl: bool, *, dtype: torch.dtype = torch.float16, **settings: Any) -> None:
    weight = packed(2 * m.inner, m.hidden, bits)
    linear(weight, gated(m.inner, dtype), pdl, dtype=dtype, norm="rms", **settings)


def down(m: Model, group: int, pdl: bool, **settings: Any) -> None:
    linear(packed(m.hidden, m.inner, group=group, zeros=False), residual(m.hidden), pdl, **settings)


def eight_bits(m: Model, dtype: torch.dtype, pdl: bool, **settings: Any) -> None:
    linear(bytes_packed(2 * m.inner, m.hidden, dtype), gated(m.inner), pdl, norm="rms", **settings)


def head(m: Model, pdl: bool, **settings: Any) -> None:
    linear(floats(m.vocabulary, m.hidden), stored(m.vocabulary), pdl, norm="rms", **settings)


def attend(m: Model, dtype: torch.dtype, pdl: bool, rows: int = 4) -> None:
    splits = decoding.default_splits(m.kv_heads, PROCESSORS)
    decoding.attention_decode(
        meta(rows, m.qkv),
        *cache(m, dtype),
        ints(rows),
        ints(rows, 512),
        *angles(m),
        None,
        None,
        eps=1e-5,
        scale=m.head_dim**-0.5,
        window=None,
        softcap=None,
        splits=splits,
        out=meta(rows, m.heads * m.head_dim, dtype=dtype if dtype.itemsize == 2 else torch.float16),
        workspace=meta(decoding.workspace_floats(rows, m.heads, m.head_dim, splits)),
        counters=ints(decoding.counter_ints(rows, m.kv_heads)),
        pdl=pdl,
    )


def attend_chunk(m: Model, dtype: torch.dtype, pdl: bool) -> None:
    half = dtype if dtype.itemsize == 2 else torch.float16
    query, out = (meta(CHUNK, m.heads * m.head_dim, dtype=half) for _ in range(2))
    kv, scales = cache(m, dtype)
    scale = m.head_dim**-0.5
    settings = {"start": 1000, "count": CHUNK - 1, "scale": scale, "window": None, "softcap": None}
    attention_prefill(query, kv, scales, ints(512), **settings, out=out, pdl=pdl)


def turn(m: Model, dtype: torch.dtype, pdl: bool) -> None:
    out = meta(CHUNK, m.heads * m.head_dim, dtype=torch.float16)
    norms = meta(m.head_dim), meta(m.head_dim)
    settings = {"start": 1000, "count": CHUNK - 1, "eps": 1e-5, "out": out, "pdl": pdl}
    rotary(meta(CHUNK, m.qkv), *cache(m, dtype), ints(512), *angles(m), *norms, **settings)


def draw(m: Model, pdl: bool) -> None:
    state = SampleState(BATCH, m.vocabulary, BATCH, META)
    sample(meta(BATCH, m.vocabulary), ints(BATCH), state, ints(8, BATCH), ints(1), pdl=pdl)


def normed(m: Model, pdl: bool) -> None:
    x, weight, out = meta(CHUNK, m.hidden), meta(m.hidden), meta(CHUNK, m.hidden, dtype=torch.bfloat16)
    norm(x, weight, None, out, norm="rms", eps=1e-5, pdl=pdl)


def normed_codes(m: Model, pdl: bool) -> None:
    x, out = meta(CHUNK, m.hidden), quantized(m.hidden, torch.int8)
    folded = meta(m.hidden), meta(m.hidden)
    norm_quantize(x, *folded, out.values, out.scales, norm="layer", eps=1e-5, static=0.1, pdl=pdl)


def codes(m: Model, pdl: bool) -> None:
    quantize_operand(operand(m.inner), CHUNK, quantized(m.inner, torch.int8), pdl=pdl)


def activated(m: Model, pdl: bool) -> None:
    gate, up = meta(BATCH, m.inner), meta(BATCH, m.inner)
    activation(gate, up, operand(m.inner), kind="silu", pdl=pdl)


def look_up(m: Model, pdl: bool) -> None:
    embed(
        ints(BATCH),
        floats(m.vocabulary, m.hidden),
        meta(CHUNK, m.hidden),
        operand(m.hidden),
        weight=meta(m.hidden),
        slots=ints(BATCH),
        last=ints(BATCH),
        pdl=pdl,
    )


DECODE = Limits(resident=4)
"""Programs of the decode step wait for memory: several share a multiprocessor, so that loads overlap."""
PREFILL = Limits(registers=255, shared=113 * 1024)

Call = Callable[[bool], object]


def w4(name: str, call: Call, *, bits: int = 4, archs: tuple[int, ...] = ARCHS, **limits: Any) -> Case:
    """Weights go from memory to the registers that multiply: what passes shared memory is x, a few stores."""
    on_90 = DECODE.but(needs=("HGMMA",), per_weight=3.2, loop_stores=8, early=2).but(**limits)
    at = {
        80: {"needs": ("HMMA",), "per_weight": 6.0, "loop_stores": None, "registers": 168, "resident": 2},
        100: {"needs": ("UTCHMMA",), "per_weight": 4.0},
    }
    return Case(f"linear_w4a16-{name}", call, on_90, at, ("words",), bits, W4_BEFORE, archs)


def f16(name: str, call: Call, limits: Limits, archs: tuple[int, ...] = ARCHS) -> Case:
    at = {arch: {"needs": (need,)} for arch, need in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"))}
    return Case(f"linear_f16-{name}", call, limits, at, ("matrix",), 16, (), archs)


def w8a8(name: str, call: Call, limits: Limits, needs: dict[int, str]) -> Case:
    """`needs`: the instruction that multiplies, by architecture."""
    at = {arch: {"needs": (need,)} for arch, need in needs.items()}
    stream = "words" if "IDP" in needs.values() else "matrix"
    early = (stream,) if stream == "words" else ()
    return Case(f"linear_w8a8-{name}", call, limits, at, (stream,), 8, early, tuple(needs))


def attention(name: str, call: Call, bits: int, archs: tuple[int, ...] = ARCHS) -> Case:
    limits = Limits(resident=2, early=4)
    early = ("positions", "tables", "kv", "scales")
    return Case(f"attention_decode-{name}", call, limits, {}, ("kv",), bits, early, archs)


def chunk(name: str, call: Call, archs: tuple[int, ...] = ARCHS) -> Case:
    limits = PREFILL.but(needs=("HGMMA",))
    at = {80: {"needs": ("HMMA",)}, 100: {"needs": ("UTCHMMA",)}}
    return Case(f"attention_prefill-{name}", call, limits, at, ("kv",), 0, (), archs)


W4_BEFORE = ("words", "scales", "zeros", "minimums")
W8A8 = Limits(resident=3)
INT8 = {80: "IMMA", 90: "IGMMA", 100: "IMMA"}  # Triton has no tcgen05 form for int8
FLOAT8 = {90: "QGMMA", 100: "UTCQMMA"}
DP4A = dict.fromkeys(ARCHS, "IDP")
CHUNKED = {"rows": CHUNK, "phase": "prefill", "once": True}
NEWEST = (90,)
WIDE = {"registers": 255, "resident": 2, "per_weight": 5}  # sums of 64 rows
PROMPT = {"rows": CHUNK, "phase": "prefill"}
CHUNKS = {"registers": 255, "resident": 1, "per_weight": 6}  # sums of 128 rows
CASES = [
    w4("qkv-llama2_7b", partial(qkv, LLAMA2_7B, 4)),
    w4("qkv-opt_6.7b", partial(layer_norm, OPT_7B), archs=NEWEST),
    w4("o-llama2_7b", partial(o, LLAMA2_7B), archs=NEWEST),
    w4("gate_up-llama2_7b", partial(gate_up, LLAMA2_7B, 4)),
    w4("gate_up-qwen2.5_7b-bf16", partial(gate_up, QWEN2_7B, 4, dtype=torch.bfloat16), archs=NEWEST),
    w4("down-llama2_7b", partial(down, LLAMA2_7B, 128)),
    w4("down-llama3.1_8b-groups_of_32", partial(down, LLAMA3_8B, 32), archs=NEWEST, early=1, per_weight=4),
    w4("gate_up-llama2_7b-8_bits", partial(gate_up, LLAMA2_7B, 8), bits=8),
    w4("qkv-llama2_7b-64_rows", partial(qkv, LLAMA2_7B, 4, rows=64), archs=NEWEST, **WIDE),
    w4("down-llama3.1_8b-prefill", partial(down, LLAMA3_8B, 128, **PROMPT), archs=NEWEST, **CHUNKS),
    f16("head-llama3.1_8b", partial(head, LLAMA3_8B), Limits(resident=2)),
    f16("head-llama3.1_8b-64_rows", partial(head, LLAMA3_8B, rows=64), Limits(), NEWEST),
    f16("head-llama3.1_8b-prefill", partial(head, LLAMA3_8B, rows=CHUNK, phase="prefill"), PREFILL),
    w8a8("gate_up-llama2_7b", partial(eight_bits, LLAMA2_7B, torch.int8), W8A8.but(per_weight=1.3), DP4A),
    w8a8(
        "gate_up-llama2_7b-8_rows",
        partial(eight_bits, LLAMA2_7B, torch.int8, rows=8),
        W8A8.but(registers=168),
        INT8,
    ),
    w8a8("gate_up-llama2_7b-fp8", partial(eight_bits, LLAMA2_7B, torch.float8_e4m3fn), W8A8, FLOAT8),
    w8a8("gate_up-llama2_7b-prefill", partial(eight_bits, LLAMA2_7B, torch.int8, **CHUNKED), PREFILL, INT8),
    attention("llama2_7b", partial(attend, LLAMA2_7B, torch.float16), 16),
    attention("llama3.1_8b-bf16", partial(attend, LLAMA3_8B, torch.bfloat16), 16),
    attention("llama2_7b-int8", partial(attend, LLAMA2_7B, torch.int8), 8),
    attention("llama3.1_8b-int8", partial(attend, LLAMA3_8B, torch.int8), 8, NEWEST),
    attention("qwen2.5_7b-fp8", partial(attend, QWEN2_7B, torch.float8_e4m3fn), 8, (90, 100)),
    chunk("llama3.1_8b", partial(attend_chunk, LLAMA3_8B, torch.float16)),
    chunk("llama3.1_8b-int8", partial(attend_chunk, LLAMA3_8B, torch.int8)),
    Case("rotary-llama3.1_8b", partial(turn, LLAMA3_8B, torch.int8), before_wait=("table",)),
    Case("activation-llama3.1_8b", partial(activated, LLAMA3_8B), streams=("gate", "up")),
    Case("norm-llama3.1_8b", partial(normed, LLAMA3_8B), streams=("x",)),
    Case("quantize-opt_6.7b-norm", partial(normed_codes, OPT_7B), streams=("x",)),
    Case("quantize-llama2_7b-inner", partial(codes, LLAMA2_7B), streams=("x",)),
    Case("sample-llama3.1_8b", partial(draw, LLAMA3_8B), streams=("logits",)),
    Case("embed-llama3.1_8b", partial(look_up, LLAMA3_8B), streams=("table",)),
]
