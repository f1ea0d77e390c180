"""Selective-scan kernels: definition, PyTorch and Triton backends behind a few functions, and what follows a scan."""

from .batch_norm import batch_norm_depthwise, batch_norm_linear, batch_statistics
from .convolved_scan import convolved_scan
from .depthwise import depthwise_conv
from .evaluated_norm import Norm, folded, normalise
from .gated_norm import layer_norm, norm_gate, norm_linear
from .linear import Linear, affine, affine_relu
from .ops import es2d_scan, has_kernels, kernel_backend, pattern_scan, scan_macs, selective_scan_1d, ss2d_scan
from .selective_scan import selective_scan_fn
from .squeeze_excite import squeeze_and_excite, squeeze_excite_add

__all__ = [
    "Linear",
    "Norm",
    "affine",
    "affine_relu",
    "batch_norm_depthwise",
    "batch_norm_linear",
    "batch_statistics",
    "convolved_scan",
    "depthwise_conv",
    "es2d_scan",
    "folded",
    "has_kernels",
    "kernel_backend",
    "layer_norm",
    "norm_gate",
    "norm_linear",
    "normalise",
    "pattern_scan",
    "scan_macs",
    "selective_scan_1d",
    "selective_scan_fn",
    "squeeze_and_excite",
    "squeeze_excite_add",
    "ss2d_scan",
]
