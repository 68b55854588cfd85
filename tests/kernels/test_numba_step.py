"""A whole compiled step against the reference decoder: every family, any company, any number of threads."""

from __future__ import annotations

import gc
import random
import threading

import numpy as np
import pytest
import torch

from nybble_kernels.numba.program import DecodeProgram
from nybble_kernels.quantized import QuantizedTensor, dense
from nybble_models.decoder import Decoder
from nybble_models.prefill import Step
from nybble_models.weights import Linear
from support_program import TOLERANCE, decode, error, program_of
from support_quantized import quantized
from support_tiny import CONFIGS, round_to_nearest, tiny_spec, tiny_weights

TOKENS = [random.Random(7).randrange(97) for _ in range(40)]
TABLE = [5, 40, 2, 9, 1, 63, 30, 31, 32, 33]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("group_size", [32, None], ids=["w4", "float"])
def test_a_step_follows_the_reference_decoder(family: str, group_size: int | None) -> None:
    spec = tiny_spec(family)
    weights = tiny_weights(spec, group_size=group_size)
    program, _ = program_of(spec, weights)
    expected = Decoder(spec, weights).forward(torch.tensor(TOKENS))
    assert error(decode(program, TOKENS, TABLE, spec.vocab_size), expected) < TOLERANCE["whole step"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_quantized_head_serves_as_embedding_where_tied(family: str) -> None:
    spec = tiny_spec(family)
    weights = tiny_weights(spec)
    stored = weights.embed if weights.head is None else weights.head.weight
    head = round_to_nearest(dense(stored), 32, bits=8)
    program, _ = program_of(spec, weights, head=head)
    if weights.head is None:
        weights.embed = head.dequantize()
    else:
        weights.head = Linear(head)
    tokens = torch.tensor(TOKENS)
    assert torch.equal(program.embedding(tokens), weights.embed[tokens])
    expected = Decoder(spec, weights).forward(tokens)
    assert error(decode(program, TOKENS, TABLE, spec.vocab_size), expected) < TOLERANCE["whole step"]


@pytest.mark.parametrize("family", ["mistral", "opt"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_its_company(family: str, threads: int) -> None:
    """Sequences of different lengths, stepped together in batches of 17 down to 1, equal the same alone."""
    spec = tiny_spec(family)
    weights = tiny_weights(spec)
    alone, _ = program_of(spec, weights)
    crowd, _ = program_of(spec, weights, threads=threads)
    chance = random.Random(2)
    rows = [[chance.randrange(97) for _ in range(2 + i)] for i in range(17)]
    expected = [decode(alone, row, [1, 2], spec.vocab_size) for row in rows]
    tables = torch.randperm(63)[:34].reshape(17, 2).int() + 1
    for position in range(18):
        live = [i for i in range(17) if position < len(rows[i])]
        tokens = np.array([rows[i][position] for i in live], np.int32)
        logits = torch.full((len(live), spec.vocab_size), float("nan"))
        crowd.step(tokens, np.full(len(live), position, np.int32), tables[live], logits)
        for line, i in zip(logits, live, strict=True):
            assert torch.equal(line, expected[i][position]), (position, i)


def test_instruction_sets_agree() -> None:
    spec = tiny_spec("llama")
    weights = tiny_weights(spec)
    best, plain = program_of(spec, weights)[0], program_of(spec, weights, isa="plain")[0]
    assert plain.isa == "plain"
    first, second = (decode(p, TOKENS, TABLE, spec.vocab_size) for p in (best, plain))
    assert error(second, first) < TOLERANCE["float32"]


def test_partners_of_different_kinds_stay_apart() -> None:
    """q in 4 bits, k in 8 with other groups, v permuted, up as floats: each read as it is."""
    spec = tiny_spec("llama")
    weights = tiny_weights(spec)
    linears = weights.blocks[1].linears
    linears["k"] = Linear(round_to_nearest(linears["k"].weight.dequantize(), 16, bits=8))  # type: ignore[union-attr]
    v = linears["v"].weight
    assert isinstance(v, QuantizedTensor)
    linears["v"] = Linear(QuantizedTensor(v.codes, v.scales, 4, 32, v.zeros, permutation=torch.randperm(64)))
    linears["up"] = Linear(linears["up"].weight.dequantize().bfloat16())  # type: ignore[union-attr]
    program, _ = program_of(spec, weights)
    expected = Decoder(spec, weights).forward(torch.tensor(TOKENS))
    assert error(decode(program, TOKENS, TABLE, spec.vocab_size), expected) < TOLERANCE["whole step"]
    for name, partners in {"qkv": "qkv", "gate_up": ("gate", "up"), "o": "o", "down": ["down"]}.items():
        out = torch.full(program.linear(1, name).shape, float("nan"))
        program.linear(1, name).dequantize_into(out)
        assert torch.equal(out, torch.cat([dense(linears[p].weight) for p in partners]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "weight",
    [
        quantized(48, 64, 4, 32, "zeros"),
        quantized(33, 128, 4, 64, "minimums"),
        quantized(17, 96, 4, 96, "symmetric"),
        quantized(40, 64, 8, 64, "symmetric"),
        quantized(40, 64, 8, 32, "minimums"),
        quantized(16, 72, 4, 24, "zeros"),
    ],
    ids=lambda w: w.describe(),
)
def test_weights_come_back_bit_for_bit(weight: QuantizedTensor, threads: int) -> None:
    outputs, inputs = weight.shape
    sizes = {"hidden_size": inputs, "word_embed_proj_dim": inputs, "ffn_dim": outputs}
    spec = tiny_spec("opt", num_attention_heads=1, **sizes)
    weights = tiny_weights(spec, group_size=None)
    weights.blocks[2].linears["up"] = Linear(weight)
    program, _ = program_of(spec, weights, threads=threads)
    out = torch.full(weight.shape, float("nan"))
    program.linear(2, "up").dequantize_into(out)
    assert torch.equal(out, weight.dequantize())
    with pytest.raises(ValueError, match="float32"):
        program.linear(2, "up").dequantize_into(out[1:])


@pytest.mark.parametrize("threads", [1, 2])
def test_filling_writes_the_cache_as_steps_do(threads: int) -> None:
    """Partners of several kinds, and as many rows as a call takes, of one sequence."""
    spec = tiny_spec("llama")
    weights = tiny_weights(spec)
    linears = weights.blocks[1].linears
    k, v = (linears[p].weight.dequantize() for p in "kv")  # type: ignore[union-attr]
    six = round_to_nearest(k, 16, bits=6)
    linears["k"] = Linear(
        QuantizedTensor(six.codes, six.scales, 6, 16, six.zeros, permutation=torch.randperm(64))
    )
    linears["v"] = Linear(v.bfloat16())
    alone, expected = program_of(spec, weights)
    decode(alone, TOKENS, TABLE, spec.vocab_size)
    program, kv = program_of(spec, weights, threads=threads, max_batch=1)
    tables = np.broadcast_to(np.array(TABLE, np.int32), (len(TOKENS), len(TABLE)))
    positions = np.arange(len(TOKENS), dtype=np.int32)
    program.fill(np.array(TOKENS, np.int32), positions, tables)
    assert torch.equal(kv.view(torch.int16), expected.view(torch.int16))
    with pytest.raises(ValueError, match="positions must be in"):
        program.fill(np.array(TOKENS, np.int32), positions + 500, tables)


def test_bytes_are_those_of_the_weights() -> None:
    spec = tiny_spec("mistral")
    weights = tiny_weights(spec)
    program, _ = program_of(spec, weights)
    fused = {"qkv": (4, 2), "o": (1, 4), "gate_up": (3, 2), "down": (1, 3)}  # fours of blocks, groups of 32
    block = {groups: -(-groups * (256 + 32 + 16) // 64) * 64 for groups in (2, 3, 4)}
    assert program.weight_bytes_per_step == {
        "linear": 3 * sum(4 * fours * block[groups] for fours, groups in fused.values()),
        "head": 8 * 16 * spec.hidden_size * 2,
        "norm": 4 * spec.hidden_size * 7,
    }
    windows = [spec.window(layer) for layer in range(spec.num_layers)]
    seen = sum(min(p + 1, w or p + 1) for p in (0, 3, 50) for w in windows)
    assert program.kv_bytes([0, 3, 50]) == seen * 2 * 2 * spec.num_kv_heads * spec.head_dim


@pytest.mark.parametrize(
    ("tokens", "positions", "tables"),
    [
        ([97], [0], [[0]]),
        ([-1], [0], [[0]]),
        ([0], [16], [[0]]),
        ([0], [-1], [[0]]),
        ([0], [160], [[0] * 20]),
        ([0], [0], [[64]]),
        ([0, 0], [0], [[0], [0]]),
        ([0] * 65, [0] * 65, [[0]] * 65),
        ([], [], np.zeros((0, 1), np.int32)),
    ],
)
def test_bad_arguments_are_refused(tokens: list[int], positions: list[int], tables: list[list[int]]) -> None:
    program = _small()
    logits = np.zeros((len(tokens), 97), np.float32)
    with pytest.raises(ValueError, match=r"must|takes|contiguous"):
        program.step(*(np.array(v, np.int32) for v in (tokens, positions, tables)), logits)


def test_wrong_types_are_refused() -> None:
    program = _small()
    one, table = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="contiguous rows"):
        program.step(one.astype(np.int64), one, table, np.zeros((1, 97), np.float32))
    with pytest.raises(ValueError, match="contiguous rows"):
        program.step(one, one, table, np.zeros((1, 194), np.float32)[:, ::2])
    with pytest.raises(ValueError, match="tokens must be"):
        program.embedding(torch.tensor([97]))


def _small() -> DecodeProgram:
    spec = tiny_spec("llama")
    program: Step = program_of(spec, tiny_weights(spec))[0]
    assert isinstance(program, DecodeProgram)
    return program


def test_threads_end_with_their_program() -> None:
    gc.collect()
    before = threading.active_count()
    program, _ = program_of(tiny_spec("llama"), tiny_weights(tiny_spec("llama")), threads=4)
    decode(program, TOKENS[:3], TABLE, 97)
    assert threading.active_count() == before + 3
    del program
    assert threading.active_count() == before


def test_many_threads_on_few_cores_give_the_same_bits() -> None:
    """Ten threads for two cores: most are late for most ops."""
    spec = tiny_spec("qwen3")
    weights = tiny_weights(spec)
    alone, _ = program_of(spec, weights)
    crowd, _ = program_of(spec, weights, threads=10)
    expected = decode(alone, TOKENS, TABLE, spec.vocab_size)
    for _ in range(5):
        assert torch.equal(decode(crowd, TOKENS, TABLE, spec.vocab_size), expected)
