"""Selective-scan kernels: definition, PyTorch and Triton backends."""
