"""LayerNorm, and that of the scan's output with its gate: fused operators where there are kernels, else PyTorch."""

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .linear import affine
from .ops import NAMESPACE, cpu_kernels, has_kernels, numba_around
from .reference import scan_type


def norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`LayerNorm(y) * SiLU(z)`: what EfficientVMamba's published code does with a scan's output (VMamba's gate).

    y `[..., D]`, the scan's output, of any float type; z of the same shape, before its SiLU, any strides;
    weight and bias `[D]`. Returns `[..., D]` in z's type; the normalisation runs in y's type, at least float32.
    Differentiable once in all four tensors. Raises ValueError for shapes that do not fit together.
    """
    D = y.shape[-1]
    if z.shape != y.shape or weight.shape != (D,) or bias.shape != (D,):
        raise ValueError(
            f"y and z must have one shape and weight and bias be [{D}], got y {list(y.shape)}, z {list(z.shape)}, "
            f"weight {list(weight.shape)}, bias {list(bias.shape)}"
        )
    if kernels := cpu_kernels(y, D, z, weight, bias):
        return kernels.norm(y, z, weight, bias, eps).to(z.dtype)
    if has_kernels(y, D):
        return fused_norm_gate(y, z, weight, bias, eps)
    dtype = scan_type(y)
    n = F.layer_norm(y.to(dtype), (D,), weight.to(dtype), bias.to(dtype), eps)
    return n.to(z.dtype) * F.silu(z)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the channels of x `[..., D]`, in float32, with the result in `dtype` (default: x's type).

    weight and bias `[D]` of any float type. On GPUs a program has many rows, for which PyTorch's has one. Autocast does
    not change the result's type. Differentiable once. Raises ValueError for a weight or bias of another shape.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight and bias must be {list(x.shape[-1:])}, got {list(weight.shape)} and {list(bias.shape)}"
        )
    dtype = x.dtype if dtype is None else dtype
    if kernels := cpu_kernels(x, x.shape[-1], weight, bias):
        return kernels.norm(x, None, weight, bias, eps).to(dtype)
    if has_kernels(x, x.shape[-1]):
        return fused_layer_norm(x, weight, bias, eps, dtype)
    wide = scan_type(x)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


def norm_linear(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, projection: Tensor, eps: float = 1e-5
) -> Tensor:
    """`linear(n, projection)` of `n = norm_gate(y, z, weight, bias)`, without z of `layer_norm(y, weight, bias)`.

    y, z, weight and bias as in those, projection `[C, D]`; result `[..., C]` in z's type, without z in autocast's or
    y's. Where there are kernels a training keeps y and z alone: the backward normalises once more. Differentiable once.
    """
    kind = y.device.type
    given = y.dtype if z is None else z.dtype
    dtype = torch.get_autocast_dtype(kind) if z is None and torch.is_autocast_enabled(kind) else given
    projection = projection.to(dtype)
    tensors = (y, z, weight, bias, projection)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors) and has_kernels(y):
        return fused_norm_linear(*tensors, eps)
    n = layer_norm(y, weight, bias, eps, dtype) if z is None else norm_gate(y, z, weight, bias, eps)
    return affine(n, projection)


def _kernels() -> Any:
    return importlib.import_module(".triton_norm", __package__)


@torch.library.custom_op(f"{NAMESPACE}::norm_gate", mutates_args=())
def fused_norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The kernel behind `norm_gate`."""
    if numba := numba_around(y):
        return numba.norm(y, z, weight, bias, eps).to(z.dtype)
    return _kernels().forward(y, z, weight, bias, eps)


@torch.library.custom_op(f"{NAMESPACE}::norm_gate_backward", mutates_args=())
def fused_norm_gate_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, z, weight and bias, each in its own type."""
    return _kernels().backward(dout, y, z, weight, bias, eps)


@fused_norm_gate.register_fake
def _(y, z, weight, bias, eps):
    return z.new_empty(z.shape)


@fused_norm_gate_backward.register_fake
def _(dout, y, z, weight, bias, eps):
    return tuple(t.new_empty(t.shape) for t in (y, z, weight, bias))


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple:
    return *fused_norm_gate_backward(dout, *ctx.saved_tensors, ctx.eps), None


fused_norm_gate.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm", mutates_args=())
def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The kernel behind `layer_norm`."""
    if numba := numba_around(x):
        return numba.norm(x, None, weight, bias, eps).to(dtype)
    return _kernels().forward(x, None, weight, bias, eps, dtype)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_backward", mutates_args=())
def fused_layer_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own type."""
    dx, _, d_weight, d_bias = _kernels().backward(dout, x, None, weight, bias, eps)
    return dx, d_weight, d_bias


@fused_layer_norm.register_fake
def _(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@fused_layer_norm_backward.register_fake
def _(dout, x, weight, bias, eps):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _save_norm_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_backward(ctx: Any, dout: Tensor) -> tuple:
    return *fused_layer_norm_backward(dout, *ctx.saved_tensors, ctx.eps), None, None


fused_layer_norm.register_autograd(_norm_backward, setup_context=_save_norm_for_backward)


@torch.library.custom_op(f"{NAMESPACE}::norm_linear", mutates_args=())
def fused_norm_linear(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, projection: Tensor, eps: float
) -> Tensor:
    """`norm_linear` with projection in the result's type."""
    with torch.autocast(y.device.type, enabled=False):
        return F.linear(_kernels().forward(y, z, weight, bias, eps, projection.dtype), projection)


@torch.library.custom_op(f"{NAMESPACE}::norm_linear_backward", mutates_args=())
def fused_norm_linear_backward(
    dout: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, z (empty without one), weight, bias and projection, each in its own type."""
    with torch.autocast(y.device.type, enabled=False):
        d_n = dout @ projection
        n = torch.empty_like(d_n, memory_format=torch.contiguous_format)
        dy, dz, d_weight, d_bias = _kernels().backward(d_n, y, z, weight, bias, eps, out=n)
        d_projection = dout.flatten(0, -2).T @ n.flatten(0, -2)
    return dy, y.new_empty(0) if dz is None else dz, d_weight, d_bias, d_projection


@fused_norm_linear.register_fake
def _(y, z, weight, bias, projection, eps):
    return projection.new_empty((*y.shape[:-1], projection.shape[0]))


@fused_norm_linear_backward.register_fake
def _(dout, y, z, weight, bias, projection, eps):
    of_z = y.new_empty(0) if z is None else z.new_empty(z.shape)
    return y.new_empty(y.shape), of_z, *(t.new_empty(t.shape) for t in (weight, bias, projection))


def _linear_backward(ctx: Any, dout: Tensor) -> tuple:
    y, z, *parameters = ctx.saved_tensors  # once: a checkpoint gives them once
    dy, dz, *of_parameters = fused_norm_linear_backward(dout, y, z, *parameters, ctx.eps)
    return dy, None if z is None else dz, *of_parameters, None


fused_norm_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


def _linear_flops(y_shape, z_shape, weight_shape, bias_shape, projection_shape, eps, *, out_shape=None) -> int:
    return 2 * math.prod(y_shape) * projection_shape[0]


def _linear_backward_flops(dout_shape, *shapes, out_shape=None) -> int:
    return 2 * _linear_flops(*shapes)


_ops = getattr(torch.ops, NAMESPACE)
register_flop_formula(_ops.norm_linear)(_linear_flops)
register_flop_formula(_ops.norm_linear_backward)(_linear_backward_flops)
