"""nybble: quantize a language model, serve it over HTTP, and measure how close both come to their limits."""

__version__ = "0.1.0"
