"""Compile the step and the kernels once per machine: first start some seconds, later ones load from disk."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from numba.core import config as _config

from nybble_kernels.numba import step
from nybble_kernels.numba.isa import Isa
from nybble_kernels.numba.jit import entry
from nybble_kernels.numba.machine import Kernels

UNUSED = 30 * 24 * 3600  # seconds
VERSION = re.compile("[0-9a-f]{16}")  # the folder of one

COMPILE = """
import sys
from pathlib import Path
from nybble_kernels.numba.compiled import compile_into
compile_into(Path(sys.argv[1]))
"""

log = logging.getLogger("nybble.kernels")

F = TypeVar("F", bound=Callable[..., Any])
Progress = Callable[[str], None]
Run = Callable[[int, int, int, int, int, int], None]
"""`run(pool, frame, program, rows, workers, number)`, without the GIL."""

_STEP_LOCK, _KERNELS_LOCK, _OTHERS_LOCK = threading.Lock(), threading.Lock(), threading.Lock()


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Where compiled code lies: under $NUMBA_CACHE_DIR or the user's cache, a folder a version of the code.

    A folder that cannot be written is replaced by one that lasts as long as the process.
    """
    root = os.environ.get("NUMBA_CACHE_DIR") or Path.home() / ".cache" / "nybble" / "numba"
    folder = Path(root) / _version()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            os.utime(folder)
            _tidy(Path(root))
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="nybble-numba-"))


def _tidy(root: Path) -> None:
    """What other versions of the code left and none has used for long. Numba's own files stay."""
    for folder in root.iterdir():
        with suppress(OSError):
            if VERSION.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > UNUSED:
                shutil.rmtree(folder)


def _version() -> str:
    """Numba's own cache looks at one file; this looks at all of them."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiled_step(progress: Progress | None = None) -> Run:
    with _STEP_LOCK:
        if progress:
            progress("loading the decode step (compiled on the first start)")
        return _step()


def kernels(isa: Isa, progress: Progress | None = None) -> Kernels:
    with _KERNELS_LOCK:
        if progress:
            progress(f"loading the {isa.name} kernels (compiled on the first start)")
        return _kernels(isa)


@lru_cache(maxsize=1)
def _step() -> Run:
    folder = cache_folder()
    if not any(folder.rglob("step.*.nbi")):
        compile_elsewhere(folder)
    return compile_into(folder)


def compile_elsewhere(folder: Path) -> None:
    """Have another process compile the step. Where that fails, this one will.

    Functions that LLVM does not inline are compiled more than once. A process that compiles calls the first
    of them, one that loads the step those beside it, and their sums differ in the last bit: answers would
    change with the second start. Beside that, two processes do not wait for one lock of Python.
    """
    here = os.pathsep.join(os.path.abspath(each) for each in sys.path)
    command = [sys.executable, "-c", COMPILE, str(folder)]
    try:
        subprocess.run(command, env=os.environ | {"PYTHONPATH": here}, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("the step is compiled in place, its last bits will not be the next start's: %s", error)


def compile_into(folder: Path) -> Run:
    """The step from the cache, or compiled into it."""
    return _loaded(step.run, "void(int64, int64, int64, int64, int64, int64)", folder)


def cached(function: F, signature: str) -> F:
    """Another function from the cache, or compiled into it. What it calls must be compiled as its part."""
    with _OTHERS_LOCK:
        return _loaded(function, signature, cache_folder())


def _loaded(function: F, signature: str, folder: Path) -> F:
    config: Any = _config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        return entry(signature)(function)
    finally:
        config.CACHE_DIR = before


@lru_cache(maxsize=4)
def _kernels(isa: Isa) -> Kernels:
    return Kernels(isa, cache_folder())
