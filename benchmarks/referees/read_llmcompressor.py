"""In environment B: llm-compressor's transformers loads compressed-tensors folders (see `reader`)."""

from __future__ import annotations

from reader import read
from write_llmcompressor import load

if __name__ == "__main__":
    read(lambda folder: {"transformers": load})
