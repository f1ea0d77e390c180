"""What is around a scan on a CPU, for inference: what is handed to the kernels of numba_map.py, and their order.

All maps have a multiple of 16 channels; the first of an operator, and what comes out, is float32.
"""

import torch
from torch import Tensor

from . import numba_launch, numba_map
from .numba_launch import Call
from .numba_map import GATES, ROWS
from .numba_vector import LANES

# What `evaluated_norm.Norm` is.
_Norm = tuple[Tensor, Tensor, Tensor, Tensor, float]
_ACTIVATIONS = {"none": numba_map.NONE, "relu": numba_map.RELU, "silu": numba_map.SILU, "gelu": numba_map.GELU}


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, norm: _Norm | None = None
) -> Tensor:
    """See `depthwise.depthwise_conv`."""
    B, H, W, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    x, stride = _pixels(x)
    call = Call(B=B, H=H, W=W, D=D, stride=stride, activation=_ACTIVATIONS[activation])
    call.bind(x=x, y=out, weight=weight.float().flatten(1).T.contiguous())
    if bias is not None:
        call.bind(bias=_numbers(bias))
    if norm is not None:
        _bind_norm(call, norm)
    call.run("around", numba_launch.DEPTHWISE, B * H)
    return out


def batch_norm(x: Tensor, norm: _Norm, relu: bool) -> Tensor:
    """See `evaluated_norm.normalise`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    D = x.shape[-1]
    call = Call(HW=x.numel() // D, D=D, activation=numba_map.RELU if relu else numba_map.NONE)
    call.bind(x=x.contiguous(), y=out)
    _bind_norm(call, norm)
    call.run("around", numba_launch.BATCH_NORM, -(-call["HW"] // ROWS))
    return out


def _bind_norm(call: Call, norm: _Norm) -> None:
    mean, var, weight, bias, eps = norm
    call.bind(
        norm_mean=_numbers(mean),
        norm_var=_numbers(var),
        norm_weight=_numbers(weight),
        norm_bias=_numbers(bias),
    )
    call.set(eps=eps)


def norm(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of `[..., D]`, times SiLU of a gate of the same shape and any type, in float32; see `gated_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    D = x.shape[-1]
    call = Call(HW=x.numel() // D, D=D, eps=eps)
    call.bind(x=x.contiguous(), y=out, weight=_numbers(weight), bias=_numbers(bias))
    if gate is not None:
        gate, stride = _pixels(gate.float())
        call.bind(gate=gate)
        call.set(stride=stride)
    call.run("around", numba_launch.NORM, -(-call["HW"] // ROWS))
    return out


def squeeze_excite_add(
    x: Tensor, u: Tensor, v: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `squeeze_excite.fused_squeeze_excite_add`."""
    B, H, W, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, gates = x.new_empty((B, 2, D)), x.new_empty((B, 2, D))
    if not out.numel():
        return out, mean, gates
    pieces = -(-H * W // ROWS)
    call = Call(B=B, HW=H * W, D=D, S=len(b1), pieces=pieces, eps=eps)
    given = {
        "x": x, "u": u, "v": v, "weight": norm_weight, "bias": norm_bias, "w1": w1, "b1": b1, "w2": w2.T, "b2": b2,
    }  # fmt: skip
    call.bind(
        y=out,
        mean=mean,
        gates=gates,
        partial=x.new_empty((B, 2, pieces, D)),
        **{name: _numbers(tensor) for name, tensor in given.items()},
    )
    call.run("around", numba_launch.SQUEEZE, 2 * B * pieces)
    call.run("around", numba_launch.EXCITE, 2 * B)
    if keep is not None:
        gates *= keep[:, None, None]
    call.run("around", numba_launch.GATED_SUM, B * pieces)
    return out, mean, gates


def squeeze_and_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """See `squeeze_excite.squeeze_and_excite`."""
    B, H, W, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    S, pieces = len(b1), -(-H * W // ROWS)
    call = Call(B=B, HW=H * W, D=D, S=S, pieces=pieces)
    call.bind(
        x=x.contiguous(),
        y=out,
        partial=x.new_empty((B, pieces, D)),
        mean=x.new_empty((B, S)),
        w1=_numbers(w1),
        b1=_numbers(b1),
        w2=_numbers(w2),
        b2=_numbers(b2),
    )
    call.run("around", numba_launch.CHANNEL_SUMS, B * pieces)
    call.run("around", numba_launch.HIDDEN, B * -(-S // LANES))
    call.run("around", numba_launch.EXCITED, B * -(-D // GATES))
    return out


def _numbers(tensor: Tensor) -> Tensor:
    """In float32 and contiguous; most are, and to look takes half as long as to ask for it."""
    return tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """A map whose pixels lie at equal distances, in numbers, each with its channels together."""
    if x.is_contiguous():
        return x, x.shape[-1]
    *sizes, _ = x.shape
    distance = x.stride(-2)
    expected = distance
    for size, stride in zip(reversed(sizes), reversed(x.stride()[:-1]), strict=True):
        if x.stride(-1) != 1 or not distance or (stride != expected and size > 1):
            return x.contiguous(), x.shape[-1]
        expected *= size
    return x, distance
