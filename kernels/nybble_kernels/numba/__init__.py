"""The CPU decode path: kernels compiled where they run, by Numba and by LLVM through llvmlite."""
