"""The packed layout holds exactly what a quantized tensor holds, in the order that layout.py describes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble_kernels.numba import packing
from nybble_kernels.numba import weight as weight_module
from nybble_kernels.numba.arena import Arena
from nybble_kernels.numba.packing import pack, unpack
from nybble_kernels.numba.weight import QuantizedWeight, hold, packed_bound
from nybble_kernels.quantized import QuantizedTensor
from support_quantized import quantized


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    bits=st.integers(2, 8),
    group=st.sampled_from([1, 8, 32, 48, 64, 100, 1000]),
    kind=st.sampled_from(["symmetric", "zeros", "minimums"]),
    permuted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unpack_gives_back_what_was_packed(
    n: int, k: int, bits: int, group: int, kind: str, permuted: bool, seed: int
) -> None:
    q = quantized(n, k, bits, group, kind, seed)
    if permuted:
        q = QuantizedTensor(q.codes, q.scales, bits, group, q.zeros, q.minimums, torch.randperm(k))
    packed = pack(q)
    again = unpack(packed)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scales, q.scales)
    assert (again.bits, again.group_size, again.symmetric) == (bits, group, q.symmetric)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert packed.room.nbytes <= packed_bound(q)


def test_codes_lie_where_the_layout_says() -> None:
    """Row 17 is row 1 of block 1; inputs 32 to 35 are the low nibbles of sub-group 1, 36 to 39 the high."""
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    codes[17, 32:36] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    codes[17, 36:40] = torch.tensor([5, 6, 7, 8], dtype=torch.uint8)
    packed = pack(QuantizedTensor(codes, torch.ones(32, 1), 4, 64))
    block = packed.room.stored()[1]
    assert block[256 + 4 : 256 + 8].tolist() == [0x51, 0x62, 0x73, 0x84]
    assert int(packed.room.stored()[:, :512].count_nonzero()) == 4


def test_planes_hold_the_low_bits_first() -> None:
    """Six bits: a plane of four words of nibbles, then one of two words with four times two bits a byte."""
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[2, 4:8] = torch.tensor([0x15, 0x2A, 0x30, 0x3F], dtype=torch.uint8)  # word 1 of row 2
    codes[2, 28] = 0x21  # word 7
    packed = pack(QuantizedTensor(codes, torch.ones(16, 1), 6, 32))
    words = packed.room.stored()[0, :384].view(6, 16, 4)[:, 2]
    assert words[0].tolist() == [0x50, 0xA0, 0x00, 0xF0]
    assert words[3].tolist() == [0x10, 0, 0, 0]
    assert words[4].tolist() == [0x1 << 2, 0x2 << 2, 0x3 << 2, 0x3 << 2]
    assert words[5].tolist() == [0x2 << 6, 0, 0, 0]
    assert packed.form.planes == ((4, 0), (2, 4))


def test_wide_codes_are_stored_signed() -> None:
    codes = torch.full((16, 32), 128, dtype=torch.uint8)
    codes[3, 5] = 255
    packed = pack(QuantizedTensor(codes, torch.ones(16, 1), 8, 32))
    assert packed.room.stored().view(torch.int8)[0, 64 + 4 * 3 + 1] == 127
    assert int(packed.room.stored()[0, :512].count_nonzero()) == 1


@pytest.mark.parametrize(("value", "half"), [(0.5, True), (0.1, False)], ids=["exact in half", "not exact"])
def test_scales_take_16_bits_only_where_that_changes_nothing(value: float, half: bool) -> None:
    q = QuantizedTensor(torch.zeros(16, 32, dtype=torch.uint8), torch.full((16, 1), value), 4, 32)
    packed = pack(q)
    assert packed.form.half is half
    assert packed.form.scale_bytes == 16 * (2 if half else 4)


def test_zeros_in_the_middle_take_no_memory() -> None:
    codes, scales = torch.randint(0, 256, (16, 256), dtype=torch.uint8), torch.ones(16, 8)
    middle = pack(QuantizedTensor(codes, scales, 8, 32))
    written = pack(QuantizedTensor(codes, scales, 8, 32, zeros=torch.full((16, 8), 128, dtype=torch.uint8)))
    assert middle.form.block_bytes(8, 1) == 16 * 256 + 16 * 8 * 2
    assert written.form.block_bytes(8, 1) == 16 * 256 + 16 * 8 * 3
    assert torch.equal(unpack(middle).dequantize(), unpack(written).dequantize())


def test_an_arena_holds_what_was_reserved_and_grows() -> None:
    """Block b lies in stream b % 4, and what fills up the last four is zero."""
    q = quantized(80, 64, 4, 32, "zeros")
    arena = Arena(2 * packed_bound(q))
    first, second = hold(q, arena), hold(q, arena)
    assert torch.equal(first.dequantize_slowly(), q.dequantize())
    assert torch.equal(second.dequantize_slowly(), q.dequantize())
    assert isinstance(first, QuantizedWeight)
    data = first.packed.room.data[0]
    assert data.shape == (2, 4, 704)
    assert data.data_ptr() % 64 == 0
    assert torch.equal(data.flatten(0, 1)[:5], pack(q).room.stored())
    assert not data[1, 1:].any()
    assert first.nbytes == 6 * 704
    place = second.packed.room.place if isinstance(second, QuantizedWeight) else (0,)
    assert place[0] - data.data_ptr() == 2 * 704
    for _ in range(3):
        assert torch.equal(hold(q, arena).dequantize_slowly(), q.dequantize())
    large = quantized(2000, 64, 4, 32, "zeros")  # more than was reserved at all
    assert torch.equal(hold(large, arena).dequantize_slowly(), large.dequantize())
    assert torch.equal(first.dequantize_slowly(), q.dequantize())


@pytest.mark.parametrize(("threads", "share"), [(1, 18), (2, 10), (3, 6), (4, 6), (16, 2)])
def test_every_thread_has_its_own_streams(threads: int, share: int) -> None:
    """17 blocks: shares are even, follow each other, and each begins where the thread's last weight ended."""
    q = quantized(270, 64, 4, 32, "zeros")
    arena = Arena(1 << 20, threads)
    first, second = pack(q, arena).room, pack(q, arena).room
    assert first.share == share
    fours = -(-share // 4)
    assert first.data.shape == (threads, fours, 4, 704)
    whole = pack(q).room.stored()
    assert torch.equal(first.stored(), whole)
    for thread in range(threads):
        own = whole[share * thread : share * (thread + 1)]
        assert torch.equal(first.data[thread].flatten(0, 1)[: len(own)], own)
        assert not first.data[thread].flatten(0, 1)[len(own) :].any()
        assert second.data[thread].data_ptr() - first.data[thread].data_ptr() == fours * 704


def test_many_rows_are_packed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    for weight in (quantized(300, 96, 5, 32, "zeros"), torch.randn(300, 96).bfloat16()):
        whole = hold(weight, Arena(1 << 20))
        for module in (packing, weight_module):
            monkeypatch.setattr(module, "PIECE", 128)
        pieces = hold(weight, Arena(1 << 20))
        monkeypatch.undo()
        expected = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.float()
        assert torch.equal(pieces.dequantize_slowly(), expected)
        assert torch.equal(whole.dequantize_slowly(), expected)
