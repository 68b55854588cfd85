"""Triton kernels: one op a file, its reference in `nybble_kernels.reference`."""
