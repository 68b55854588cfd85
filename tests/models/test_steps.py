"""The torch step and the prefill against the reference decoder, for every family."""

from __future__ import annotations

import itertools

import pytest
import torch

from nybble_models import paged
from nybble_models.decoder import Decoder
from nybble_models.prefill import FloatPrompts, SteppedPrompts
from nybble_models.torch_step import TorchStep
from support_program import TOLERANCE, decode, program_of
from support_tiny import CONFIGS, tiny_spec, tiny_weights

BLOCK = 16
TABLE = [5, 1, 7, 3, 9, 2, 8, 0]  # blocks in no order


def runners(family: str, group_size: int | None = 32) -> tuple[Decoder, TorchStep, FloatPrompts]:
    spec = tiny_spec(family)
    weights = tiny_weights(spec, group_size=group_size)
    kv = paged.allocate(spec, 10, BLOCK)
    head = weights.embed if weights.head is None else weights.head.weight
    step = TorchStep.reference(spec, weights, kv, head)
    return Decoder(spec, weights), step, FloatPrompts(spec, weights, step, kv, torch.float32)


def tokens_of(count: int) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def relative_rmse(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("family", CONFIGS)
def test_prefill_matches_the_reference(family: str) -> None:
    decoder, _, prefill = runners(family)
    tokens = tokens_of(61)
    logits = prefill.score(tokens, 0, TABLE)
    assert relative_rmse(logits, decoder.forward(torch.tensor(tokens))) < 0.02  # the cache is bfloat16


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prompt_as_batches_of_the_compiled_step(family: str) -> None:
    """Cache and logits are those of decoding it token by token, however it is cut."""
    spec = tiny_spec(family)
    weights = tiny_weights(spec)
    tokens = tokens_of(100)
    alone, held = program_of(spec, weights, blocks=10, block_size=BLOCK)
    logits = decode(alone, tokens, TABLE, spec.vocab_size)
    assert (
        relative_rmse(logits, Decoder(spec, weights).forward(torch.tensor(tokens))) < TOLERANCE["whole step"]
    )
    for cuts in ((0, 100), (0, 1, 40, 100)):
        program, kv = program_of(spec, weights, blocks=10, block_size=BLOCK, threads=2, max_batch=3)
        prompts = SteppedPrompts(spec, program)
        for a, b in itertools.pairwise(cuts):
            prompts.fill(tokens[a:b], a, TABLE)
        assert torch.equal(kv.view(torch.int16), held.view(torch.int16))
        assert torch.equal(
            torch.cat([prompts.score(tokens[a:b], a, TABLE) for a, b in itertools.pairwise(cuts)]), logits
        )
        assert torch.equal(kv.view(torch.int16), held.view(torch.int16))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("cuts", [(16,), (1, 2, 40), (60,), (32, 48)], ids=str)
def test_prefill_in_chunks_is_bit_equal(family: str, cuts: tuple[int, ...]) -> None:
    tokens = tokens_of(61)
    _, _, whole = runners(family)
    _, _, cut = runners(family)
    expected = whole.run(tokens, 0, TABLE)
    edges = [0, *cuts, len(tokens)]
    parts = [cut.run(tokens[a:b], a, TABLE) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(cut.kv, whole.kv)


def test_a_long_prompt_is_bit_equal_however_it_is_cut() -> None:
    spec = tiny_spec("llama", max_position_embeddings=512)
    weights = tiny_weights(spec, group_size=32)
    kv = paged.allocate(spec, 20, BLOCK)
    step = TorchStep.reference(
        spec, weights, kv, weights.embed if weights.head is None else weights.head.weight
    )
    prompts, tokens, table = (
        FloatPrompts(spec, weights, step, kv, torch.float32),
        tokens_of(300),
        list(range(20)),
    )
    whole = prompts.score(tokens, 0, table)
    assert relative_rmse(whole, Decoder(spec, weights).forward(torch.tensor(tokens))) < 0.02
    cut = [prompts.score(tokens[a:b], a, table) for a, b in ((0, 70), (70, 290), (290, 300))]
    assert torch.equal(torch.cat(cut), whole)


@pytest.mark.parametrize("family", CONFIGS)
def test_decode_continues_a_prefill(family: str) -> None:
    decoder, step, prefill = runners(family)
    tokens = tokens_of(40)
    prefill.run(tokens[:33], 0, TABLE)
    made = torch.empty(7, 97)
    for i in range(7):
        step.step(
            torch.tensor([tokens[33 + i]], dtype=torch.int32),
            torch.tensor([33 + i], dtype=torch.int32),
            torch.tensor([TABLE], dtype=torch.int32),
            made[i : i + 1],
        )
    assert relative_rmse(made, decoder.forward(torch.tensor(tokens))[33:]) < 0.02


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_of_a_batch_are_bit_equal_to_the_row_alone(family: str) -> None:
    spec = tiny_spec(family)
    weights = tiny_weights(spec)
    kv = paged.allocate(spec, 40, BLOCK)
    head = weights.embed if weights.head is None else weights.head.weight
    step = TorchStep(spec, weights, kv, head)
    rows = 9
    tables = torch.arange(rows * 4, dtype=torch.int32).view(rows, 4)
    alone, together = torch.full((rows, 97), torch.nan), torch.full((rows, 97), torch.nan)
    for position in range(20):
        tokens = torch.tensor(tokens_of(rows), dtype=torch.int32) + position % 3
        places = torch.full((rows,), position, dtype=torch.int32)
        snapshot = kv.clone()
        step.step(tokens % 97, places, tables, together)
        batched = kv.clone()
        kv.copy_(snapshot)
        for b in range(rows):
            step.step(tokens[b : b + 1] % 97, places[b : b + 1], tables[b : b + 1], alone[b : b + 1])
        assert torch.equal(kv, batched)
        assert torch.equal(alone, together)


def test_window_limits_what_a_step_reads() -> None:
    _, step, _ = runners("mistral")
    assert step.kv_bytes([3]) * 7 == step.kv_bytes([100]) * 4
