"""What is multiplied on a GPU, by which shapes, and that nothing wrong is timed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("model", "linear", "w4", "w8", "w16"),
    [
        ("OPT-6.7B", 6.442, 3.834, 6.854, 13.30),
        ("OPT-13B", 12.583, 7.199, 13.10, 25.68),
        ("Llama-2-7B", 6.476, 3.703, 6.738, 13.21),
        ("Llama-2-13B", 12.688, 7.068, 13.02, 25.70),
        ("Llama-2-70B", 68.451, 36.89, 68.98, 137.4),
        ("Llama-3.1-8B", 6.979, 4.758, 8.030, 15.01),
        ("Qwen2.5-7B", 6.525, 4.557, 7.615, 14.14),
    ],
)
def test_shapes_add_up(model: str, linear: float, w4: float, w8: float, w16: float) -> None:
    """Billions of weights in linears, and GB a token, worked out by hand from each config."""
    from shapes import MODELS, linears, token_bytes

    spec = MODELS[model]
    matrices = linears(spec)
    outputs, inputs = matrices.pop("head")
    assert (outputs, inputs) == (spec.vocab_size, spec.hidden_size)
    count = spec.num_layers * sum(n * k for n, k in matrices.values())
    assert count / 1e9 == pytest.approx(linear, abs=5e-4)
    for bits, gigabytes in ((4.25, w4), (8, w8), (16, w16)):
        assert token_bytes(spec, bits) / 1e9 == pytest.approx(gigabytes, rel=5e-4)


def test_our_codes_keep_their_meaning_in_tinygemm() -> None:
    """The op's own CPU form says what its words and scales mean."""
    import subject
    import tinygemm
    import torch

    torch.manual_seed(0)
    matrix = subject.random_matrix(64, 256, "cpu")
    codes, scales, zeros = tinygemm.unsigned(matrix.codes, 256)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
    both = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()
    x = torch.randn(3, 256).bfloat16()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, 128, both)
    assert subject.error(y, x, tinygemm.meaning(matrix.codes, scales, zeros)) < 5e-3
    assert subject.error(y, x, matrix.dense) < 1e-2


def test_a_wrong_subject_is_never_timed(tmp_path: Path) -> None:
    import argparse

    import torch
    from cases import Case
    from linears import Bench
    from part import begin
    from peers import Cublas
    from rows import read
    from subject import Matrix, Prepared

    class Wrong(Cublas):
        def prepare(self, matrix: Matrix, m: int) -> Prepared:
            made = super().prepare(matrix, m)
            return Prepared(made.tensors, lambda x, w: made.run(x, w) * 1.5, made.means)

    asked = argparse.Namespace(out=tmp_path, seconds=60, dry=True)
    bench = Bench(begin("linears", asked), [Wrong(torch.float16)])
    bench.run(Case("tiny", "o", 32, 64, (1, 2, 3, 4)))
    rows = read(tmp_path / "gpu.jsonl")
    assert not [row for row in rows if "us" in row]
    assert "relative error 5.00e-01" in rows[0]["reason"]
    assert rows[-1]["reason"] == "left out from here on: 3 failures"


def test_copies_exceed_twice_the_l2() -> None:
    from clock import copies

    for size in (9 << 20, 48 << 20, 300 << 20):
        assert copies(size, 50 << 20) * size > 2 * (50 << 20)


def test_every_product_of_a_model_is_tuned_once() -> None:
    import argparse

    from tune import products

    found = products(argparse.Namespace(dry=False, models=["Llama-2-7B", "OPT-6.7B"]))
    assert len(found) == len(set(found))
    kinds = {(p.kind, p.phase) for p in found if (p.outputs, p.inputs) == (12288, 4096)}
    assert kinds == {(kind, phase) for kind in ("W4A16", "W8A8") for phase in ("decode", "prefill")}
    assert {p.kind for p in found if p.outputs == 32000} == {"fp16", "W8A8"}
