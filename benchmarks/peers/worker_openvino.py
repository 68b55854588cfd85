"""openvino-genai as a worker: its pipeline on the CPU over the GGUF file; runs in its own environment."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker_lines import Verb, answer, gaps


class Subject:
    def __init__(self, path: str) -> None:
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU")

    def run(self, prompt: list[int], tokens: int) -> Any:
        """Greedy, whatever ends a text."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        return self.pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), config)

    def decode(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        found = self.run(prompt, tokens)
        milliseconds = found.perf_metrics.raw_metrics.m_new_token_times
        return {"gaps": gaps([1e-3 * each for each in milliseconds]), "ids": list(found.tokens[0])}

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token is chosen."""
        return 1e-3 * float(self.run(prompt, 1).perf_metrics.get_ttft().mean)


def make(path: str) -> tuple[Mapping[str, Any], Mapping[str, Verb]]:
    subject = Subject(path)
    versions = {name: importlib.metadata.version(name) for name in ("openvino", "openvino-genai")}
    return {"versions": versions}, {"decode": subject.decode, "prefill": subject.prefill}


if __name__ == "__main__":
    answer(make)
