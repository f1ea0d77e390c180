"""Selective-scan kernels: definition, PyTorch and Triton backends behind a few functions, and what follows a scan."""

from .gated_norm import norm_gate
from .ops import es2d_scan, pattern_scan, scan_macs, selective_scan_1d, ss2d_scan
from .selective_scan import selective_scan_fn

__all__ = ["es2d_scan", "norm_gate", "pattern_scan", "scan_macs", "selective_scan_1d", "selective_scan_fn", "ss2d_scan"]
