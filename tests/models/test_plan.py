"""The memory plan against what is really held."""

from __future__ import annotations

import pytest

from nybble_models import paged
from nybble_models.plan import Quantization, plan, weight_bytes
from support_tiny import CONFIGS, tiny_spec, tiny_weights

W4G32 = Quantization(4, 32, 20)


@pytest.mark.parametrize("family", CONFIGS)
def test_planned_weights_are_those_held(family: str) -> None:
    spec = tiny_spec(family)
    held = tiny_weights(spec).nbytes()
    biases = 4 * spec.num_layers * sum(spec.shape(p)[0] for p in spec.projections if spec.has_bias(p))
    matrix = spec.vocab_size * spec.hidden_size
    embeddings = matrix if spec.tied_head else 3 * matrix  # the head at 8 bits, an embedding of its own at 16
    assert weight_bytes(spec, W4G32, Quantization(8)) == held["linear"] - biases + embeddings


def test_the_cache_is_what_its_tokens_take() -> None:
    spec = tiny_spec("llama")
    made = plan(spec, W4G32, kv_tokens=160)
    assert made.kv == paged.allocate(spec, 10, 16).nbytes == 160 * paged.bytes_per_token(spec)


def test_an_automatic_cache_shrinks_to_fit() -> None:
    spec = tiny_spec("llama")
    roomy = plan(spec, W4G32, memory=1 << 40)
    fixed = roomy.weights + roomy.workspace
    tight = plan(spec, W4G32, memory=fixed + 100 * paged.bytes_per_token(spec))
    assert roomy.kv_tokens == 4 * 160
    assert tight.kv_tokens == 96
    assert tight.max_model_len <= 100
    assert tight.total <= fixed + 100 * paged.bytes_per_token(spec)


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    spec = tiny_spec("llama")
    with pytest.raises(MemoryError, match="bytes are needed"):
        plan(spec, W4G32, max_model_len=160, memory=1000)
