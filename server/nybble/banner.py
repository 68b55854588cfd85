"""What a server says once it is ready: a panel for people, one `key=value` line for logs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import nybble
from nybble.config import ServeConfig
from nybble.engine.stats import EngineInfo
from nybble.terminal import console, size


def show(info: EngineInfo, config: ServeConfig, names: tuple[str, ...], url: str) -> None:
    """Print the banner to standard error."""
    if not console().is_terminal:
        print_line(facts(info, config, names, url))
        return
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for label, value in rows(info, config, names, url):
        table.add_row(Text(label, style="dim"), Text(value))
    title = f"nybble {nybble.__version__} is ready"
    console().print(Panel(table, title=title, title_align="left", border_style="green", expand=False))


def print_line(values: Mapping[str, object]) -> None:
    pairs = (f"{name}={shlex.quote(str(value))}" for name, value in values.items())
    console().print("ready " + " ".join(pairs), soft_wrap=True, markup=False)


def facts(info: EngineInfo, config: ServeConfig, names: tuple[str, ...], url: str) -> dict[str, object]:
    """The banner as values."""
    return {
        "version": nybble.__version__,
        "model": names[0],
        "family": info.family,
        "parameters": info.parameters,
        "quantization": info.quantization,
        "bits": f"{info.bits:.2f}",
        "weight_bytes": sum(info.weight_bytes.values()),
        "kv_tokens": info.block_size * info.num_blocks,
        "max_model_len": info.max_model_len,
        "device": info.device,
        "dtype": info.dtype,
        **{f"kernels_{phase}": path for phase, path in info.kernels.items()},
        "bandwidth": f"{info.bandwidth / 1e9:.1f}GB/s",
        "load_seconds": f"{sum(info.load_seconds.values()):.1f}",
        "url": url,
        "auth": "on" if config.keys() else "off",
    }


def rows(info: EngineInfo, config: ServeConfig, names: tuple[str, ...], url: str) -> list[tuple[str, str]]:
    """The banner for people."""
    known = facts(info, config, names, url)
    tokens = info.block_size * info.num_blocks
    weights, cache = sum(info.weight_bytes.values()), tokens * info.kv_bytes_per_token
    kernels = ", ".join(f"{phase} {path}" for phase, path in info.kernels.items())
    return [
        ("model", f"{', '.join(names)} ({info.family}, {info.parameters / 1e6:.0f}M parameters)"),
        ("weights", f"{info.quantization}, {info.bits:.2f} bits on average, {size(weights)}"),
        ("KV cache", f"{tokens} tokens, {size(cache)}; up to {info.max_model_len} a request"),
        ("device", f"{info.device}, {info.dtype}, reads {info.bandwidth / 1e9:.1f} GB/s"),
        ("kernels", kernels),
        ("loaded", f"in {known['load_seconds']} s"),
        ("API", f"{url}/v1"),
        ("metrics", f"{url}/metrics"),
        ("auth", _auth(bool(config.keys()), config.host)),
    ]


def _auth(keys: bool, host: str) -> str:
    if keys:
        return "on: clients must send a key"
    if host in ("127.0.0.1", "localhost", "::1"):
        return "off: only this machine can connect"
    return "off: anyone who reaches this address can use it; NYBBLE_API_KEY sets a key"
