"""Offline quantizers: a checkpoint in, a quantized checkpoint and a report out."""
