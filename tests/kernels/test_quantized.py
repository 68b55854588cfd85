"""What a QuantizedTensor means, for every kind of zero point, width and group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble_kernels.quantized import QuantizedTensor, cat, compatible
from support_quantized import quantized


def by_hand(q: QuantizedTensor, n: int, k: int) -> float:
    g = k // q.group_size
    scale, code = q.scales[n, g].item(), int(q.codes[n, k])
    if q.minimums is not None:
        return scale * code + q.minimums[n, g].item()
    zero = 2 ** (q.bits - 1) if q.zeros is None else int(q.zeros[n, g])
    return scale * (code - zero)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([1, 3, 8, 32, 100]),
    kind=st.sampled_from(["symmetric", "zeros", "minimums"]),
    k=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_dequantize_is_the_formula(bits: int, group: int, kind: str, k: int, seed: int) -> None:
    q = quantized(3, k, bits, group, kind, seed)
    weight = q.dequantize()
    for n in range(3):
        for column in range(0, k, 7):
            assert weight[n, column].item() == pytest.approx(by_hand(q, n, column), rel=1e-6, abs=1e-6)
    offsets = q.offsets().repeat_interleave(group, 1)[:, :k]
    scales = q.scales.repeat_interleave(group, 1)[:, :k]
    assert torch.allclose(weight, scales * q.codes + offsets, atol=1e-4)


def test_a_real_minimum_is_exact() -> None:
    """GGUF's Q4_1: d · q + m in float32, rounded as numpy rounds it."""
    scale, minimum = torch.tensor([[0.0123291015625]]), torch.tensor([[-0.09234619140625]])
    codes = torch.arange(16, dtype=torch.uint8)[None]
    weight = QuantizedTensor(codes, scale, 4, 16, minimums=minimum).dequantize()
    assert torch.equal(weight, codes.float() * scale + minimum)


def test_a_permutation_puts_columns_back() -> None:
    q = quantized(4, 8, 4, 4, "zeros")
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    permuted = QuantizedTensor(q.codes, q.scales, 4, 4, zeros=q.zeros, permutation=order)
    x = torch.randn(8)
    assert torch.allclose(permuted.dequantize() @ x, q.dequantize() @ x[order], atol=1e-5)


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minimums"])
def test_cat_and_rows_are_inverses(kind: str) -> None:
    parts = [quantized(n, 64, 4, 32, kind, seed=n) for n in (3, 5, 2)]
    fused = cat(parts)
    assert torch.equal(fused.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert torch.equal(fused.rows(3, 8).dequantize(), parts[1].dequantize())


@pytest.mark.parametrize(
    "other",
    [
        quantized(3, 64, 8, 32, "zeros"),
        quantized(3, 64, 4, 64, "zeros"),
        quantized(3, 64, 4, 32, "symmetric"),
        quantized(3, 32, 4, 32, "zeros"),
    ],
    ids=["bits", "group", "kind", "inputs"],
)
def test_unlike_partners_do_not_fuse(other: QuantizedTensor) -> None:
    one = quantized(3, 64, 4, 32, "zeros")
    assert compatible(one, one)
    assert not compatible(one, other)
    with pytest.raises(ValueError, match="cannot fuse"):
        cat([one, other])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"codes": torch.zeros(2, 4)}, "codes must be uint8"),
        ({"scales": torch.ones(2, 3)}, "scales must be"),
        ({"zeros": torch.zeros(2, 1, dtype=torch.uint8), "minimums": torch.zeros(2, 1)}, "not both"),
    ],
    ids=["bits", "codes", "scales", "both"],
)
def test_contradictions_are_refused(changes: dict[str, object], says: str) -> None:
    good = {
        "codes": torch.zeros(2, 4, dtype=torch.uint8),
        "scales": torch.ones(2, 1),
        "bits": 4,
        "group_size": 4,
    }
    with pytest.raises(ValueError, match=says):
        QuantizedTensor(**(good | changes))  # type: ignore[arg-type]


def test_bytes_are_those_of_a_packed_form() -> None:
    assert quantized(8, 64, 4, 32, "symmetric").nbytes == 8 * 64 // 2 + 16 * 2
    assert quantized(8, 64, 4, 32, "zeros").nbytes == 8 * 64 // 2 + 16 * 2 + 16 // 2
    assert quantized(8, 64, 4, 32, "minimums").nbytes == 8 * 64 // 2 + 16 * 4
