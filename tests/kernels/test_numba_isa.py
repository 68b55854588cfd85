"""Kernels for processors that are not here: they compile, and use the instructions they are for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nybble_kernels.numba import compiled
from nybble_kernels.numba.compiled import cache_folder
from nybble_kernels.numba.isa import AVX2, AVX512_VNNI, AVX_VNNI, NEON, PLAIN, Isa, choose
from nybble_kernels.numba.layout import Format
from nybble_kernels.numba.machine import Target, assembly

FORMS = Format(6, half=True, offsets="zero"), Format(8, half=False, offsets="minimum")
X86, ARM, MACOS = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-macosx"


@pytest.mark.parametrize(
    ("isa", "cpu", "triple", "present", "absent"),
    [
        (AVX512_VNNI, "znver4", X86, ("vpdpbusd", "zmm"), ("vpmaddubsw",)),
        (AVX_VNNI, "alderlake", X86, ("vpdpbusd", "ymm"), ("zmm", "vpmaddubsw")),
        (AVX2, "haswell", X86, ("vpmaddubsw", "vcvtph2ps"), ("zmm", "vpdpbusd")),
        (PLAIN, "x86-64", X86, ("pmaddwd",), ("ymm", "pmaddubsw")),
        (NEON, "neoverse-n1", ARM, ("sdot", "fcvtl", "fmla"), ("ymm",)),
        (NEON, "apple-m1", MACOS, ("sdot",), ("ymm",)),
        (PLAIN, "cortex-a72", ARM, ("fmla",), ("sdot",)),
    ],
    ids=["avx512vnni", "avxvnni", "avx2", "plain x86", "neon", "neon macos", "plain arm"],
)
def test_it_compiles_for_its_processors(
    isa: Isa, cpu: str, triple: str, present: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    target = Target(cpu, "", triple)
    text = "".join(assembly(isa, target, form) for form in (None, *FORMS))
    for word in present:
        assert word in text, word
    for word in absent:
        assert word not in text, word


def test_the_environment_may_force_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_ISA", "plain")
    assert choose() is PLAIN
    assert choose("auto") is not PLAIN or choose().name == "plain"
    with pytest.raises(ValueError, match=r"these can: .*plain"):
        choose("sse9")


def test_the_cache_lies_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    cache_folder.cache_clear()
    try:
        assert cache_folder().parent == tmp_path
        monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
        cache_folder.cache_clear()
        assert cache_folder().is_dir()
    finally:
        cache_folder.cache_clear()


def test_what_no_version_uses_any_more_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young, others = (tmp_path / name for name in ("0" * 16, "1" * 16, "somebody_s"))
    for folder in (old, young, others):
        folder.mkdir()
        (folder / "file").write_text("x")
    for folder in (old, others):
        os.utime(folder, (0, time.time() - compiled.UNUSED - 1))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    cache_folder.cache_clear()
    try:
        made = cache_folder()
    finally:
        cache_folder.cache_clear()
    assert sorted(tmp_path.iterdir()) == sorted([made, young, others])


def test_the_process_that_serves_never_runs_what_it_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last bits would be others than those of the next start."""
    monkeypatch.setattr(compiled, "cache_folder", lambda: tmp_path)
    run: Any = compiled._step.__wrapped__()
    assert run.stats.cache_hits and not run.stats.cache_misses


def test_a_step_that_no_other_process_compiles_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compiled.compile_elsewhere(tmp_path)
    assert "compiled in place" in caplog.text


SECOND_START = """
import time
from nybble_kernels.numba import compiled, isa, layout, machine
del machine.optimise
started = time.perf_counter()
run = compiled.compiled_step()
compiled.kernels(isa.choose()).dequantize(layout.Format(4, True, "zero"))
assert run.stats.cache_hits and not run.stats.cache_misses
print(time.perf_counter() - started)
"""


def test_a_second_start_compiles_nothing() -> None:
    """Another process finds step and kernels on disk."""
    compiled.compiled_step()
    compiled.kernels(choose()).dequantize(Format(4, half=True, offsets="zero"))
    folders = {"PYTHONPATH": "kernels", "NUMBA_CACHE_DIR": str(cache_folder().parent)}
    done = subprocess.run(
        [sys.executable, "-c", SECOND_START],
        capture_output=True,
        text=True,
        env=os.environ | folders,
        check=True,
    )
    assert float(done.stdout) < 10
