"""llama.cpp's library as a worker: llama_decode and its greedy sampler, without the Python layers above.

Runs in the environment of llama-cpp-python; `--requantize FROM TO` writes a Q4_0 file and ends.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
import time
from collections.abc import Mapping
from typing import Any

import llama_cpp.llama_cpp as lib
from worker_lines import Verb, answer, gaps

BATCH = 512
FLASH_ATTENTION_ON = 1


class Subject:
    """One model, one context; the threads of a step are chosen by each request."""

    def __init__(self, path: str, context: int) -> None:
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"error: llama.cpp does not load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.flash_attn_type = FLASH_ATTENTION_ON
        self.context = lib.llama_init_from_model(self.model, params)
        self.greedy = lib.llama_sampler_init_greedy()

    def step(self, tokens: list[int]) -> int:
        """The token after these."""
        array = (lib.llama_token * len(tokens))(*tokens)
        if status := lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returns {status}")
        return int(lib.llama_sampler_sample(self.greedy, self.context, -1))

    def begin(self, prompt: list[int], threads: int) -> int:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        lib.llama_set_n_threads(self.context, threads, threads)
        return self.step(prompt)

    def decode(self, prompt: list[int], tokens: int, threads: int) -> dict[str, Any]:
        ids = [self.begin(prompt, threads)]
        arrivals = [time.perf_counter()]
        while len(ids) < tokens:
            ids.append(self.step(ids[-1:]))
            arrivals.append(time.perf_counter())
        return {"gaps": gaps(arrivals), "ids": ids}

    def prefill(self, prompt: list[int], threads: int) -> float:
        """Seconds until the first token is chosen."""
        started = time.perf_counter()
        self.begin(prompt, threads)
        return time.perf_counter() - started


def make(path: str, context: int) -> tuple[Mapping[str, Any], Mapping[str, Verb]]:
    subject = Subject(path, context)
    facts = {
        "versions": {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")},
        "system": lib.llama_print_system_info().decode(),
    }
    return facts, {"decode": subject.decode, "prefill": subject.prefill}


def requantize(source: str, target: str) -> None:
    """Q4_0, all 4-bit tensors anew; llama.cpp keeps the head at the type it chooses itself."""
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if status := lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"error: llama_model_quantize returns {status}")


if __name__ == "__main__":
    if sys.argv[1] == "--requantize":
        requantize(*sys.argv[2:])
    else:
        answer(make)
