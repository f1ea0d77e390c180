"""The scan of a convolved map: in training on GPUs one operator, which does not keep what the convolution made."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .depthwise import depthwise_conv, fused_depthwise_conv, fused_depthwise_conv_backward
from .ops import (
    NAMESPACE,
    check_inputs,
    has_kernels,
    pattern_scan,
    save_scan_for_backward,
    scan2d_backward,
    scan2d_train,
    scan_macs,
)
from .paths import pattern_named

ACTIVATION = "silu"


def convolved_scan(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> Tensor:
    """`pattern_scan(depthwise_conv(x, conv_weight, conv_bias, "silu"), ...)`: shapes, types and errors as theirs.

    Where there are kernels a training keeps x and the scan's states: the backward convolves once more, which reads and
    writes the map once. Differentiable once.
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    tensors = (x, conv_weight, conv_bias, *parameters)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not trained or not has_kernels(x):
        return pattern_scan(depthwise_conv(x, conv_weight, conv_bias, ACTIVATION), *parameters, pattern)
    check_inputs(x, *parameters, K=pattern_named(pattern).sets)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return convolved_scan_train(x, conv_weight, conv_bias, *parameters, pattern)[0]


@torch.library.custom_op(f"{NAMESPACE}::convolved_scan_train", mutates_args=())
def convolved_scan_train(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> tuple[Tensor, Tensor]:
    """The map and the states that the backward starts from, as `scan2d_train` gives them."""
    signal = fused_depthwise_conv(x, conv_weight, conv_bias, ACTIVATION)
    return scan2d_train(signal, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern)


@convolved_scan_train.register_fake
def _(x, conv_weight, conv_bias, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern):
    return scan2d_train(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple:
    if dy is None:
        return (None,) * 9
    x, conv_weight, conv_bias, *parameters, states = ctx.saved_tensors  # once: a checkpoint gives them once
    of_convolution, of_parameters = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:8]
    signal = fused_depthwise_conv(x, conv_weight, conv_bias, ACTIVATION)
    wanted = [any(of_convolution), *of_parameters]
    d_signal, *gradients = scan2d_backward(dy, signal, *parameters, states, ctx.pattern, wanted)
    del signal, states, dy
    given: tuple[Tensor | None, ...] = (None, None, None)
    if wanted[0]:
        given = fused_depthwise_conv_backward(d_signal, x, conv_weight, conv_bias, ACTIVATION)
    needed = zip((*given, *gradients), ctx.needs_input_grad, strict=False)
    return *(gradient if need else None for gradient, need in needed), None


convolved_scan_train.register_autograd(_backward, setup_context=save_scan_for_backward)


def _flops(
    x_shape,
    conv_shape,
    conv_bias_shape,
    x_proj_shape,
    dt_shape,
    bias_shape,
    A_shape,
    D_shape,
    pattern,
    *,
    out_shape=None,
) -> int:
    B, H, W, D = x_shape
    return 2 * (9 * math.prod(x_shape) + sum(scan_macs(B, H, W, D, A_shape[1], dt_shape[2], pattern)))


register_flop_formula(getattr(torch.ops, NAMESPACE).convolved_scan_train)(_flops)
