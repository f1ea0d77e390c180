"""BatchNorm in training with its activation and the layer behind it: operators on GPUs that keep BatchNorm's input.

What is kept of a map `[B, H, W, C]` is the map before the norm and the two statistics of its channels; normalised,
activated and gated maps are computed again in the passes that the backward makes anyway. Statistics and norm are two
operators: one moves the running statistics in place and has no gradient; the others take what it returns, and their
gradient goes through the statistics too.
"""

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .depthwise import fused_depthwise_conv, fused_depthwise_conv_backward
from .ops import NAMESPACE


def batch_norm_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    projection: Tensor,
    shift: Tensor | None = None,
    squeeze: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """`linear(gate a, projection, shift)` with `a = activation(BatchNorm(x))`, in autocast's type or x's.

    x `[B, H, W, C]` float32, bfloat16 or float16; stats from `batch_statistics(x)`; BatchNorm's weight and bias `[C]`;
    activation "relu" or "gelu"; projection `[E, C]`, shift `[E]`. The gate is one, or with squeeze = (w1 `[S, C]`, b1
    `[S]`, w2 `[C, S]`, b2 `[C]`) that of each image: `sigmoid(w2 relu(w1 mean(a) + b1) + b2)`, in float32, the mean
    over H and W. Result `[B, H, W, E]`. Differentiable once, in stats through x. For tensors that `ops.has_kernels` is
    true of.
    """
    dtype = _compute_type(x)
    x, projection, shift = x.to(dtype), projection.to(dtype), None if shift is None else shift.to(dtype)
    return fused_batch_norm_linear(
        x, stats, weight, bias, *(squeeze or (None,) * 4), projection, shift, activation
    )[0]  # fmt: skip


def batch_norm_depthwise(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, activation: str, kernel: Tensor
) -> Tensor:
    """Depthwise 3x3 convolution, without a bias, of `activation(BatchNorm(x))`, in autocast's type or x's.

    kernel `[C, 1, 3, 3]`, result `[B, H, W, C]`; the others as in `batch_norm_linear`.
    """
    return fused_batch_norm_depthwise(x.to(_compute_type(x)), stats, weight, bias, kernel, activation)


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _kernels() -> Any:
    return importlib.import_module(".triton_batch_norm", __package__)


@torch.library.custom_op(f"{NAMESPACE}::batch_statistics", mutates_args=("running_mean", "running_var"))
def batch_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of the channels of x `[B, H, W, C]`: float32 `[2, C]`, without gradient.

    Moves the running mean and the running, unbiased variance `[C]` towards them by `momentum`, as `nn.BatchNorm2d`.
    """
    return _kernels().statistics(x, running_mean, running_var, momentum, eps)


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_linear", mutates_args=())
def fused_batch_norm_linear(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    projection: Tensor,
    shift: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Behind `batch_norm_linear`; also, for its backward, the means float32 `[B, C]` (empty without a gate)."""
    with torch.autocast(x.device.type, enabled=False):
        gate, mean = None, x.new_empty(0, dtype=torch.float32)
        if network := [t for t in (w1, b1, w2, b2) if t is not None]:
            mean = _kernels().pool(x, stats, weight, bias, None, activation) / (x.shape[1] * x.shape[2])
            gate = _gate(mean, *network)[1]
        return F.linear(_kernels().forward(x, stats, weight, bias, gate, activation), projection, shift), mean


def _gate(mean: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    hidden = F.relu(F.linear(mean, w1.float(), b1.float()))
    return hidden, torch.sigmoid(F.linear(hidden, w2.float(), b2.float()))


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_depthwise", mutates_args=())
def fused_batch_norm_depthwise(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, activation: str
) -> Tensor:
    """Behind `batch_norm_depthwise`."""
    return fused_depthwise_conv(_kernels().forward(x, stats, weight, bias, None, activation), kernel, None, "none")


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_act", mutates_args=())
def batch_norm_act(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """`activation(BatchNorm(x))`, without gradient."""
    return _kernels().forward(x, stats, weight, bias, None, activation)


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_gate_gradient", mutates_args=())
def gate_gradient(dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Sums over the pixels of `dy activation(BatchNorm(x))`: float32 `[B, C]`."""
    return _kernels().pool(x, stats, weight, bias, dy, activation)


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_act_backward", mutates_args=())
def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    d_sum: Tensor | None,
    activation: str,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own type, from that of `y = gate activation(BatchNorm(x))`.

    d_sum, float32 `[B, C]` beside a gate, is that of the activation's sum over the pixels. Fourth comes y `again`, or
    nothing (empty).
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if again else None
    gradients = _kernels().backward(dy, x, stats, weight, bias, gate, d_sum, activation, y)
    return *gradients, x.new_empty(0) if y is None else y


@batch_statistics.register_fake
def _(x, running_mean, running_var, momentum, eps):
    return x.new_empty((2, x.shape[-1]), dtype=torch.float32)


@fused_batch_norm_linear.register_fake
def _(x, stats, weight, bias, w1, b1, w2, b2, projection, shift, activation):
    mean = x.new_empty(0 if w1 is None else (x.shape[0], x.shape[-1]), dtype=torch.float32)
    return x.new_empty((*x.shape[:-1], projection.shape[0])), mean


@fused_batch_norm_depthwise.register_fake
def _(x, stats, weight, bias, kernel, activation):
    return x.new_empty(x.shape)


@batch_norm_act.register_fake
def _(x, stats, weight, bias, activation):
    return x.new_empty(x.shape)


@gate_gradient.register_fake
def _(dy, x, stats, weight, bias, activation):
    return x.new_empty((x.shape[0], x.shape[-1]), dtype=torch.float32)


@batch_norm_act_backward.register_fake
def _(dy, x, stats, weight, bias, gate, d_sum, activation, again):
    return *(t.new_empty(t.shape) for t in (x, weight, bias)), x.new_empty(x.shape if again else 0)


def _save_for_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _save_linear_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _linear_backward(ctx: Any, dout: Tensor | None, _: None) -> tuple:
    if dout is None:
        return (None,) * 11
    x, stats, weight, bias, w1, b1, w2, b2, projection, shift, mean = ctx.saved_tensors  # once: a checkpoint gives once
    with torch.autocast(x.device.type, enabled=False):
        norm, gate, d_sum, of_gate = (x, stats, weight, bias), None, None, (None,) * 4
        dy = dout @ projection
        if w1 is not None:
            # The gate's own network is tiny: [B, C] rows.
            hidden, gate = _gate(mean, w1, b1, w2, b2)
            d_gate = gate_gradient(dy, *norm, ctx.activation) * gate * (1 - gate)
            d_hidden = (d_gate @ w2.float()) * (hidden > 0)
            d_sum = (d_hidden @ w1.float()) / (x.shape[1] * x.shape[2])
            gradients = (d_hidden.T @ mean, d_hidden.sum(0), d_gate.T @ hidden, d_gate.sum(0))
            of_gate = tuple(d.to(t.dtype) for d, t in zip(gradients, (w1, b1, w2, b2), strict=True))
        dx, d_weight, d_bias, y = batch_norm_act_backward(dy, *norm, gate, d_sum, ctx.activation, True)
        d_projection = dout.flatten(0, -2).T @ y.flatten(0, -2)
        d_shift = None if shift is None else dout.sum((0, 1, 2))
    return dx, None, d_weight, d_bias, *of_gate, d_projection, d_shift, None


def _depthwise_backward(ctx: Any, dout: Tensor) -> tuple:
    *norm, kernel = ctx.saved_tensors
    a = batch_norm_act(*norm, ctx.activation)
    da, d_kernel, _ = fused_depthwise_conv_backward(dout, a, kernel, None, "none")
    del a
    dx, d_weight, d_bias, _ = batch_norm_act_backward(da, *norm, None, None, ctx.activation, False)
    return dx, None, d_weight, d_bias, d_kernel, None


fused_batch_norm_linear.register_autograd(_linear_backward, setup_context=_save_linear_for_backward)
fused_batch_norm_depthwise.register_autograd(_depthwise_backward, setup_context=_save_for_backward)


def _linear_flops(x_shape, stats, weight, bias, w1_shape, b1, w2, b2, projection_shape, *_, out_shape=None) -> int:
    of_gate = 0 if w1_shape is None else 4 * x_shape[0] * math.prod(w1_shape)
    return 2 * math.prod(x_shape) * projection_shape[0] + of_gate


def _depthwise_flops(x_shape, *_, out_shape=None) -> int:
    return 2 * 9 * math.prod(x_shape)


_ops = getattr(torch.ops, NAMESPACE)
register_flop_formula(_ops.batch_norm_linear)(_linear_flops)
register_flop_formula(_ops.batch_norm_depthwise)(_depthwise_flops)
