"""Tensors in, tensors out: quantized tensors, their packing, and the ops that read them."""
