"""Every setting of a server, in one frozen record. Importing this needs neither torch nor a command line."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nybble.errors import UsageError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """What the command line, the reference page and the checks know about a field. Limits are inclusive."""

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[object, ...] = ()

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def expects(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        if self.high is None:
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


def _setting(group: str, default: Any, help: str, *, repr: bool = True, **limits: Any) -> Any:
    return field(default=default, repr=repr, metadata={"setting": Setting(group, help, **limits)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What `nybble serve` runs with. A zero or "auto" is resolved once, when the engine is built."""

    model: str = _setting(
        "Model", "default", 'folder, .gguf file, hub id, or "default" (SmolLM2-135M-Instruct)'
    )
    served_model_name: tuple[str, ...] = _setting(
        "Model", (), "name that clients ask for; repeat for aliases"
    )
    quantization: str = _setting(
        "Model",
        "auto",
        "how an unquantized model is quantized before serving",
        choices=("auto", "awq", "gptq", "awq+gptq", "rtn", "smoothquant", "smoothquant+gptq", "fp8", "none"),
    )
    bits: int = _setting("Model", 0, "bits per weight; 0 takes what the method does best", low=0, high=8)
    group_size: int = _setting(
        "Model", 0, "weights that share a scale; 0 takes what the method does best", low=0, high=65536
    )
    target_bits: float = _setting(
        "Model",
        0.0,
        "choose the bits of each linear, so many on average; 0: all alike",
        low=0,
        high=16,
    )
    symmetric: bool = _setting("Model", False, "quantize without zero points")
    calibration: str | None = _setting(
        "Model", None, ".txt or .jsonl to calibrate on; else text of the model itself"
    )
    head_bits: int = _setting("Model", 8, "bits of the output head", choices=(4, 8, 16))

    canary: bool = _setting(
        "Model", True, "replay the prompts that came with the checkpoint before the server is ready"
    )
    min_top1_agreement: float = _setting(
        "Model",
        0.0,
        "least share of the canary's tokens on which the unquantized model must agree; below, serve fails",
        low=0,
        high=1,
    )

    host: str = _setting("Server", "127.0.0.1", "address to listen on")
    port: int = _setting("Server", 8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    api_key: tuple[str, ...] = _setting(
        "Server",
        (),
        "key that clients must send; repeat for several (the environment hides it from ps)",
        repr=False,
    )
    api_key_file: str | None = _setting("Server", None, "file with one key a line")
    metrics_open: bool = _setting("Server", True, "let /metrics be read without a key")
    log_level: str = _setting("Server", "info", "what to log", choices=("debug", "info", "warning", "error"))

    device: str = _setting("Engine", "auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    threads: int = _setting("Engine", 0, "CPU threads; 0 takes the physical cores", low=0, high=1024)
    kernels: str = _setting(
        "Engine",
        "auto",
        "which kernels run a step",
        choices=("auto", "numba", "torch", "reference", "triton"),
    )
    dtype: str = _setting(
        "Engine", "auto", "type of activations", choices=("auto", "float32", "bfloat16", "float16")
    )
    kv_cache_tokens: int = _setting(
        "Engine", 0, "tokens the KV cache holds; 0 takes what memory allows", low=0
    )
    kv_cache_dtype: str = _setting(
        "Engine",
        "auto",
        "type of cached keys and values; a GPU takes the 8-bit ones too",
        choices=("auto", "bfloat16", "float16", "int8", "fp8"),
    )
    block_size: int = _setting("Engine", 16, "tokens in a KV block", low=1, high=1024)
    max_model_len: int = _setting("Engine", 0, "longest prompt plus answer; 0 takes the model's own", low=0)
    packed_cache: bool = _setting(
        "Engine", True, "keep the model as the CPU's kernels read it, in the cache folder, for the next start"
    )
    max_num_seqs: int = _setting("Engine", 32, "sequences that run together", low=1, high=4096)
    max_num_batched_tokens: int = _setting("Engine", 512, "tokens in one step", low=1)
    prefix_cache: bool = _setting("Engine", True, "reuse KV blocks of equal prefixes")

    max_queue: int = _setting("Limits", 256, "requests that may wait; more get 503", low=0)
    max_body_bytes: int = _setting("Limits", 8 * MIB, "largest request body", low=1024)
    max_n: int = _setting("Limits", 16, "largest n", low=1)
    max_prompts: int = _setting("Limits", 128, "most prompts in one request", low=1)
    max_logprobs: int = _setting("Limits", 20, "most alternatives per token", low=0, high=1000)
    header_timeout: float = _setting("Limits", 10.0, "seconds a client has to send its headers", low=0.1)
    body_timeout: float = _setting("Limits", 30.0, "seconds a client has to send its body", low=0.1)
    keep_alive: float = _setting("Limits", 15.0, "seconds of silence before a stream gets a comment", low=0.1)
    drain_timeout: float = _setting("Limits", 30.0, "seconds that running requests get after SIGTERM", low=0)
    drain_grace: float = _setting("Limits", 0.0, "seconds to keep listening after SIGTERM", low=0)

    cache_dir: str = _setting("Model", "", "where models are kept (default ~/.cache/nybble)")

    def __post_init__(self) -> None:
        for each in fields(self):
            setting: Setting = each.metadata["setting"]
            value = getattr(self, each.name)
            if not setting.accepts(value):
                raise UsageError(f"{each.name}: {value!r} is not {setting.expects}", hint=setting.help)
        if not self.model:
            raise UsageError("model: empty", hint="give a folder, a .gguf file, a hub id, or leave it out")

    @property
    def cache_path(self) -> Path:
        """The cache folder; it may not exist yet."""
        chosen = self.cache_dir or os.environ.get("NYBBLE_CACHE_DIR") or "~/.cache/nybble"
        return Path(chosen).expanduser()

    def keys(self) -> tuple[str, ...]:
        """All API keys; empty means that the server is open. Reads `api_key_file`."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"api_key_file: {error}", hint="one key a line, UTF-8") from None
        listed = tuple(line.strip() for line in lines if line.strip())
        if not listed:
            raise UsageError(f"api_key_file: {self.api_key_file} holds no key", hint="one key a line")
        return self.api_key + listed
