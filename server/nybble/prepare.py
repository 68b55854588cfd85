"""From the name a user gives to a model that can be served: fetch it, and quantize it once into the cache.

The only module of the server that reaches the quantizers, and it does so only when there is something to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nybble
from nybble.config import ServeConfig
from nybble.engine.protocol import Progress
from nybble_models.checkpoint import read_config
from nybble_models.formats.gguf_tokenizer import write_tokenizer
from nybble_models.hub import fetch, name_of

if TYPE_CHECKING:
    from nybble_quantizers.report import QuantizeProgress
    from nybble_quantizers.scheme import Scheme

PATIENCE = 1.0  # seconds between two looks whether another process is done
TOKENIZER_BYTES = 64 << 20  # a tokenizer.json of a quarter of a million pieces takes half of that


def prepare(config: ServeConfig, progress: Progress, widths: tuple[int, ...] = ()) -> tuple[Path, Path]:
    """The folder or GGUF file to serve, and the folder with its tokenizer: the same, but for a GGUF file.

    widths: bits that the kernels read as so many, for a scheme that chooses; none given: the scheme's own.
    Raises `UsageError` and the floors' own errors.
    """
    source = fetch(config.model, config.cache_path, lambda text: progress(text, 0.0))
    if config.quantization == "none" or (source.is_dir() and quantized(source)):
        return source, source if source.is_dir() else _tokenizer_of(source, config)
    scheme = scheme_of(config, widths)
    name = f"{name_of(config.model)}-{scheme.label}-{_key(source, config, scheme)}"
    target = config.cache_path / "models" / name
    if not target.exists():
        with _alone(target, progress):
            if not target.exists():
                _quantize(source, target, scheme, config.calibration, progress)
    return target, target


def quantized(directory: Path) -> bool:
    """Whether a folder holds weights that are quantized already."""
    return bool(read_config(directory).get("quantization_config"))


def scheme_of(config: ServeConfig, widths: tuple[int, ...] = ()) -> Scheme:
    """How an unquantized model is quantized before it is served. widths: see `prepare`."""
    scheme = _named(config)
    return replace(scheme, widths=widths) if widths and scheme.mixes else scheme


def _named(config: ServeConfig) -> Scheme:
    from nybble_quantizers.scheme import preset

    chosen = {"bits": config.bits, "group_size": config.group_size, "target_bits": config.target_bits}
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value}
    given |= {"symmetric": True} if config.symmetric else {}
    if config.quantization == "auto":
        return preset("W4A16", **given) if given else preset("auto")
    if config.quantization == "fp8":
        return preset("FP8", **given)
    smooths = config.quantization.startswith("smoothquant")
    return preset("W8A8" if smooths else "W4A16", method=config.quantization, **given)


def _quantize(
    source: Path, target: Path, scheme: Scheme, calibration: str | None, progress: Progress
) -> None:
    from nybble_quantizers.pipeline import quantize

    def tell(event: QuantizeProgress) -> None:
        progress(f"quantize: {event.stage}", event.done / max(event.total, 1))

    command = shlex.join(["nybble", *sys.argv[1:]])
    quantize(source, target, scheme, calibration=calibration, progress=tell, command=command)


@contextmanager
def _alone(target: Path, progress: Progress) -> Iterator[None]:
    """One process at a time: the second of two first starts waits, and finds what the first has made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    with path.open("w") as file:
        while not _locked(file.fileno()):
            progress("waiting for another process that quantizes this model", 0.0)
            time.sleep(PATIENCE)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tokenizer_of(source: Path, config: ServeConfig) -> Path:
    """The tokenizer's files of a GGUF file, written into the cache once."""
    stat = source.stat()
    facts = repr((str(source.resolve()), stat.st_size, stat.st_mtime_ns, nybble.__version__))
    key = hashlib.sha256(facts.encode()).hexdigest()[:8]
    target = config.cache_path / "models" / f"{name_of(config.model)}-tokenizer-{key}"
    if not target.exists():
        from nybble_quantizers.output import appearing

        with appearing(target, TOKENIZER_BYTES, key) as folder:
            write_tokenizer(source, folder)
    return target


def _key(source: Path, config: ServeConfig, scheme: Scheme) -> str:
    """Changes when a file of the source, the calibration text, the scheme or the quantizer does."""
    from nybble_quantizers.journal import fingerprint, key_of

    return key_of(source, fingerprint(config.calibration), repr(scheme), nybble.__version__)[:8]
