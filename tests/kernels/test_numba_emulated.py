"""Kernels of another processor in an emulator: the bits of this machine. Needs a cross compiler and QEMU."""

from __future__ import annotations

import shutil
import struct
import subprocess
from ctypes import CFUNCTYPE, c_long, c_void_p
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nybble_kernels.numba import compiled
from nybble_kernels.numba.arena import AHEAD, Arena, words
from nybble_kernels.numba.isa import NEON, choose
from nybble_kernels.numba.layout import ROWS, STREAMS, SUB, TILES, Format, activation_bytes, aligned
from nybble_kernels.numba.machine import Target, build_module, optimise
from nybble_kernels.numba.weight import QuantizedWeight, hold
from nybble_kernels.quantized import QuantizedTensor
from support_quantized import quantized

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
)

INPUTS, OUTPUTS, BATCH = 192, ROWS * STREAMS, 8
TARGET = Target("cortex-a76", "+dotprod", "aarch64-unknown-linux-gnu")

MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
typedef void product(void *, long, void *, long, void *, long, long, long, long);
extern product FORM_m1, FORM_m1_b2, FORM_m2, FORM_m4, FORM_m8;
extern void FORM_dequantize(void *, void *, long, long, long, long, long);
extern void quantize_row(void *, void *, long);
int main(int count, char **names) {
    long h[6]; /* bytes of the weights, from stream to stream, from row to row; groups, subs, inputs */
    FILE *file = fopen(names[1], "rb");
    if (fread(h, 8, 6, file) != 6) return 1;
    char *w = aligned_alloc(64, h[0] + AHEAD), *q = aligned_alloc(64, 8 * h[2]);
    float *x = malloc(32 * h[5]), *y = malloc(4 * 8 * 64), *d = malloc(4 * 16 * h[5]);
    if (fread(w, 1, h[0], file) != h[0] || fread(x, 4, 8 * h[5], file) != 8 * h[5]) return 1;
    for (int row = 0; row < 8; row++) quantize_row(x + h[5] * row, q + h[2] * row, h[5] / 32);
    product *all[4] = {FORM_m8, FORM_m4, FORM_m2, FORM_m1};
    file = fopen(names[2], "wb");
    for (int i = 0; i < 4; i++) {
        for (int row = 0; row < 8; row += 8 >> i)
            all[i](w, h[1], q + h[2] * row, h[2], y + 64 * row, 256, h[3], h[4], 4);
        fwrite(y, 4, 8 * 64, file);
    }
    for (int row = 0; row < 8; row++) {
        float *z = y + 64 * row; /* two blocks, then two from the third on */
        FORM_m1_b2(w, h[1], q + h[2] * row, h[2], z, 256, h[3], h[4], 2);
        FORM_m1_b2(w + 2 * h[1], h[1], q + h[2] * row, h[2], z + 32, 256, h[3], h[4], 2);
    }
    fwrite(y, 4, 8 * 64, file);
    for (int block = 0; block < 4; block++) {
        FORM_dequantize(w + h[1] * block, d, 4 * h[5], 0, 16, h[3], h[4]);
        fwrite(d, 4, 16 * h[5], file);
    }
    return fclose(file);
}
"""


def emulated(form: Format, folder: Path, given: bytes) -> NDArray[np.float32]:
    machine = TARGET.machine()
    for name, each in (("base", None), ("form", form)):
        code = machine.emit_object(optimise(build_module(NEON, each), machine))
        (folder / f"{name}.o").write_bytes(code)
    (folder / "main.c").write_text(MAIN.replace("FORM", form.name).replace("AHEAD", str(AHEAD)))
    parts = [folder / name for name in ("main.c", "form.o", "base.o")]
    subprocess.run([COMPILER, "-static", "-o", folder / "main", *parts, "-lm"], check=True)
    (folder / "given").write_bytes(given)
    subprocess.run([EMULATOR, "-cpu", "max", *(folder / n for n in ("main", "given", "made"))], check=True)
    return np.fromfile(folder / "made", np.float32)


def here(form: Format, held: QuantizedWeight, x: torch.Tensor, stride: int) -> NDArray[np.float32]:
    """Row by row, by this processor's kernels."""
    kernels = compiled.kernels(choose())
    round_row = CFUNCTYPE(None, c_void_p, c_void_p, c_long)(kernels["quantize_row"])
    multiply = CFUNCTYPE(None, *[c_void_p, c_long] * 3, c_long, c_long, c_long)(kernels.gemv(form, 1))
    packed, row = held.packed, words(stride // 8)
    y = np.empty((BATCH, OUTPUTS), np.float32)
    for m in range(BATCH):
        round_row(x[m].data_ptr(), row.ctypes.data, INPUTS // SUB)
        sizes = packed.groups, packed.subs
        start, _, stream, _ = packed.room.place
        multiply(start, stream, row.ctypes.data, stride, y[m].ctypes.data, 0, *sizes, STREAMS)
    return y


@pytest.mark.parametrize(("bits", "kind"), [(4, "zeros"), (7, "minimums"), (8, "symmetric")])
def test_neon_gives_the_bits_of_this_machine(tmp_path: Path, bits: int, kind: str) -> None:
    weight = quantized(OUTPUTS, INPUTS, bits, 64, kind)
    if kind != "minimums":  # they keep float32 scales
        weight = QuantizedTensor(weight.codes, weight.scales.half().float(), bits, 64, weight.zeros)
    arena = Arena(1 << 20)
    held = hold(weight, arena)
    assert isinstance(held, QuantizedWeight)
    form, x = held.packed.form, torch.randn(BATCH, INPUTS)
    blocks, stride = held.packed.room.stored(), aligned(activation_bytes(INPUTS))
    head = blocks.numel(), blocks.shape[1], stride, held.packed.groups, held.packed.subs, INPUTS
    made = emulated(form, tmp_path, struct.pack("6q", *head) + blocks.numpy().tobytes() + x.numpy().tobytes())
    ways = [*TILES, "two blocks"]
    products = made[: len(ways) * BATCH * OUTPUTS].reshape(len(ways), BATCH, OUTPUTS)
    expected = here(form, held, x, stride)
    for way, product in zip(ways, products, strict=True):
        assert np.array_equal(product, expected), way
    assert np.array_equal(made[products.size :].reshape(OUTPUTS, INPUTS), weight.dequantize().numpy())
