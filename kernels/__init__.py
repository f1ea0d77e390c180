"""Selective-scan kernels: definition, PyTorch and Triton backends behind two functions."""

from .ops import es2d_scan, scan_macs, ss2d_scan

__all__ = ["es2d_scan", "scan_macs", "ss2d_scan"]
