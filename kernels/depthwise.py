"""Depthwise 3x3 convolution of channels-last maps with what follows it, one operator where it has kernels."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .evaluated_norm import Norm, folded
from .ops import NAMESPACE, cpu_kernels, has_kernels, numba_around

ACTIVATIONS = {"none": lambda v: v, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", norm: Norm | None = None
) -> Tensor:
    """`activation(norm(conv(x) + bias))` with zeros around the map, every channel by itself.

    x `[B, H, W, C]`, any strides; weight `[C, 1, 3, 3]`, bias `[C]` or None; activation "none", "relu", "silu" or
    "gelu" (exact). Result `[B, H, W, C]` in x's type, or autocast's. Differentiable once.
    Raises ValueError for another activation, or a weight, bias or norm of another shape.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    C = x.shape[-1]
    if weight.shape != (C, 1, 3, 3):
        raise ValueError(f"weight must be [{C}, 1, 3, 3] for x with {C} channels, got {list(weight.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must be [{C}] for x with {C} channels, got {list(bias.shape)}")
    if norm is not None:
        norm.check(x)
    if kernels := cpu_kernels(x, C, weight, bias, *(norm or ())[:4]):
        return kernels.depthwise_conv(x, weight, bias, activation, norm)
    if norm is not None:
        weight, bias = (t.to(weight.dtype) for t in folded(weight, bias, norm))
    if not has_kernels(x, C):
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=C)
        return ACTIVATIONS[activation](y.permute(0, 2, 3, 1))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return fused_depthwise_conv(x, weight, bias, activation)


def _kernels() -> Any:
    return importlib.import_module(".triton_depthwise", __package__)


@torch.library.custom_op(f"{NAMESPACE}::depthwise_conv", mutates_args=())
def fused_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The kernel behind `depthwise_conv`."""
    if numba := numba_around(x):
        return numba.depthwise_conv(x, weight, bias, activation)
    return _kernels().forward(x, weight, bias, activation)


@torch.library.custom_op(f"{NAMESPACE}::depthwise_conv_backward", mutates_args=())
def fused_depthwise_conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own type (the bias's also where there is none)."""
    return _kernels().backward(dout, x, weight, bias, activation)


@fused_depthwise_conv.register_fake
def _(x, weight, bias, activation):
    return x.new_empty(x.shape)


@fused_depthwise_conv_backward.register_fake
def _(dout, x, weight, bias, activation):
    of_bias = weight.new_empty(weight.shape[0]) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), of_bias


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, dout: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors  # once: a checkpoint gives them once
    dx, d_weight, d_bias = fused_depthwise_conv_backward(dout, x, weight, bias, ctx.activation)
    return dx, d_weight, None if bias is None else d_bias, None


fused_depthwise_conv.register_autograd(_backward, setup_context=_save_for_backward)
