"""From the name a user gives to a folder that can be served: fetch it, and quantize it once into the cache.

The only module of the server that reaches the quantizers, and it does so only when there is something to do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import nybble
from nybble.config import ServeConfig
from nybble.engine.protocol import Progress
from nybble_models.checkpoint import read_json
from nybble_models.hub import fetch, name_of


def prepare(config: ServeConfig, progress: Progress) -> Path:
    """The folder to serve. Raises `UsageError` and the floors' own errors."""
    source = fetch(config.model, config.cache_path, lambda text: progress(text, 0.0))
    if source.is_dir() and (quantized(source) or config.quantization == "none"):
        return source
    target = config.cache_path / "models" / f"{name_of(config.model)}-{_label(config)}-{_key(source, config)}"
    if not target.exists():
        _quantize(source, target, config, progress)
    return target


def quantized(directory: Path) -> bool:
    """Whether a folder holds weights that are quantized already."""
    return bool(read_json(directory / "config.json").get("quantization_config"))


def _quantize(source: Path, target: Path, config: ServeConfig, progress: Progress) -> None:
    from nybble_quantizers.pipeline import quantize
    from nybble_quantizers.scheme import Scheme

    scheme = Scheme(
        method=config.quantization,  # type: ignore[arg-type]  # the config has checked it
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    quantize(
        source,
        target,
        scheme,
        calibration=config.calibration,
        progress=lambda event: progress(f"quantize: {event.stage}", event.done / max(event.total, 1)),
    )


def _label(config: ServeConfig) -> str:
    if config.quantization == "none":
        return "w16"
    return f"{config.quantization}-w{config.bits}g{config.group_size}" + ("-sym" if config.symmetric else "")


def _key(source: Path, config: ServeConfig) -> str:
    """Changes when the source, the calibration text or the quantizer does."""
    files = [source] if source.is_file() else [*sorted(source.glob("*.safetensors")), source / "config.json"]
    if config.calibration:
        files.append(Path(config.calibration))
    facts = [(f.name, f.stat().st_size) for f in files if f.exists()]
    if source.is_dir():
        facts += [(str(source.resolve()), max(f.stat().st_mtime_ns for f in files if f.exists()))]
    text = repr((facts, nybble.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
