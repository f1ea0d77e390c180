"""The selective scan of Mamba by the signature of `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`.

Code that was written for that function runs with this one, on CPU and GPU and without a CUDA build. The recurrence is
one operator; what comes before and after it (bias, softplus, skip, gate) is left to PyTorch, which differentiates it
and, under torch.compile, fuses it. Source: Mamba, arXiv 2312.00752, algorithm 2.

Backends (`chunked_selective_scan.py`, `triton_selective_scan.py`) offer `forward(u, delta, A, B, C, save) -> (y,
last_state, states)`, `states_shape(batch, channels, L, N, G)` and `backward(dy, d_last, u, delta, A, B, C, states) ->
gradients of u, delta, A, B, C`, all of the scan's type, B and C `[batch, G, N, L]` of any strides.
"""

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import chunked_selective_scan, portable, reference
from .ops import DTYPES, NAMESPACE, backend_name, no_double_backward


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`y_t = C_t . h_t + D u_t` with `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`, times `silu(z_t)` if z is given.

    The scan runs in float32 (float64 for float64 u), the result has u's type. Differentiable once, the last state too
    (mamba_ssm ignores its gradient).

    Args:
        u: `[batch, channels, L]`, float32, float64, bfloat16 or float16.
        delta: step sizes like u, before bias and softplus.
        A: `[channels, N]`, real.
        B: `[batch, N, L]`, `[batch, G, N, L]` with G a divisor of the channels, or `[channels, N]` for all tokens; the
            last takes the memory of G = channels.
        C: likewise.
        D: skip `[channels]`.
        z: gate like u.
        delta_bias: `[channels]`, added to delta.
        delta_softplus: whether delta goes through softplus.
        return_last_state: also return the state after the last token, `[batch, channels, N]` in the scan's type.

    Raises:
        ValueError: shapes, types or devices that do not fit together; a complex A, which no network of ours has.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    dtype = reference.scan_type(u)
    x, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    B, C = _grouped(B.to(dtype), C.to(dtype), u.shape[0], u.shape[2])
    y, last_state = _recurrence(x, step, A.to(dtype), B, C)
    if D is not None:
        y = y + x * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or min(u.shape[1:]) < 1:
        raise ValueError(f"u must be [batch, channels, L] with at least one channel and token, got {list(u.shape)}")
    batch, channels, L = u.shape
    if A.is_complex():
        raise ValueError("A is complex; only real A are supported (as in Mamba; S4's were complex)")
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"A must be [{channels}, N] for u with {channels} channels, got {list(A.shape)}")
    N = A.shape[1]
    for name, tensor, shape in (("delta", delta, u.shape), ("z", z, u.shape), ("D", D, u.shape[1:2]),
                                ("delta_bias", delta_bias, u.shape[1:2])):  # fmt: skip
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        groups = tensor.shape[1] if tensor.dim() == 4 else 1
        allowed = ((channels, N), (batch, N, L), (batch, groups, N, L))
        if tuple(tensor.shape) not in allowed or not groups or channels % groups:
            raise ValueError(
                f"{name} must be [{batch}, {N}, {L}], [{batch}, G, {N}, {L}] with G a divisor of {channels}, or "
                f"[{channels}, {N}]; got {list(tensor.shape)}"
            )
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, part in tensors.items():
        if part is not None and part.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {part.dtype}")
        if part is not None and part.device != u.device:
            raise ValueError(f"{name} is on {part.device}, u on {u.device}")


def _grouped(B: Tensor, C: Tensor, batch: int, L: int) -> tuple[Tensor, Tensor]:
    """B and C as `[batch, G, N, L]` with the same G."""
    B, C = (_with_groups(t, batch, L) for t in (B, C))
    if B.shape[1] != C.shape[1]:
        G = math.lcm(B.shape[1], C.shape[1])  # a divisor of the channels, as both are
        B, C = (t.repeat_interleave(G // t.shape[1], dim=1) for t in (B, C))
    return B, C


def _with_groups(t: Tensor, batch: int, L: int) -> Tensor:
    if t.dim() == 2:
        return t[None, :, :, None].expand(batch, -1, -1, L)
    return t[:, None] if t.dim() == 3 else t


def _recurrence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    if portable.is_portable():
        return _portably(u, delta, A, B, C)
    if backend_name(u.device.type, u.dtype) == "reference":
        return _by_definition(u, delta, A, B, C)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C)):
        return selective_scan_train(u, delta, A, B, C)[:2]
    return selective_scan(u, delta, A, B, C)


def _portably(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    G = B.shape[1]
    step, product = (t.unflatten(1, (G, -1)).permute(3, 0, 1, 2) for t in (delta, delta * u))
    Bt, Ct = (t.permute(3, 0, 1, 2) for t in (B, C))
    y, last_state = portable.recurrence(A.unflatten(0, (G, -1)), step, product, Bt, Ct)
    return y.permute(1, 2, 3, 0).flatten(1, 2), last_state.flatten(1, 2)


def _by_definition(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    G = B.shape[1]
    x, step = (t.unflatten(1, (G, -1)).mT for t in (u, delta))
    y, last_state = reference.recurrence(x, step, A.unflatten(0, (G, -1)), B.mT, C.mT)
    return y.mT.flatten(1, 2), last_state.flatten(1, 2)


def _backend(u: Tensor) -> Any:
    if backend_name(u.device.type, u.dtype) == "triton":
        return importlib.import_module(".triton_selective_scan", __package__)
    return chunked_selective_scan


@torch.library.custom_op(f"{NAMESPACE}::selective_scan", mutates_args=())
def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence for inference: y like u and the last state `[batch, channels, N]`; saves nothing."""
    with torch.autocast(u.device.type, enabled=False):
        return _backend(u).forward(u, delta, A, B, C, save=False)[:2]


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_train", mutates_args=())
def selective_scan_train(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence for training: also the states that the backward starts from, in the backend's own layout."""
    with torch.autocast(u.device.type, enabled=False):
        return _backend(u).forward(u, delta, A, B, C, save=True)


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor, d_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C."""
    with torch.autocast(u.device.type, enabled=False):
        return _backend(u).backward(dy, d_last, u, delta, A, B, C, states)


@selective_scan.register_fake
def _(u, delta, A, B, C):
    return u.new_empty(u.shape), u.new_empty(*u.shape[:2], A.shape[1])


@selective_scan_train.register_fake
def _(u, delta, A, B, C):
    states = _backend(u).states_shape(*u.shape, A.shape[1], B.shape[1])
    return u.new_empty(u.shape), u.new_empty(*u.shape[:2], A.shape[1]), u.new_empty(states)


@selective_scan_backward.register_fake
def _(dy, d_last, u, delta, A, B, C, states):
    return tuple(t.new_empty(t.shape) for t in (u, delta, A, B, C))


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None, _: None) -> tuple:
    if dy is None and d_last is None:
        return (None,) * 5
    u, _, A, *_ = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    d_last = u.new_zeros(*u.shape[:2], A.shape[1]) if d_last is None else d_last
    return tuple(selective_scan_backward(dy, d_last, *ctx.saved_tensors))


selective_scan_train.register_autograd(_backward, setup_context=_save_for_backward)
selective_scan_backward.register_autograd(no_double_backward)


def _flops(u_shape, delta_shape, A_shape, B_shape, C_shape, *, out_shape=None) -> int:
    batch, channels, L = u_shape
    return 2 * 9 * batch * channels * L * A_shape[1]  # as `ops.scan_macs` counts a scan


def _backward_flops(dy_shape, d_last_shape, *shapes, out_shape=None) -> int:
    return 2 * _flops(*shapes[:5])


_ops = getattr(torch.ops, NAMESPACE)
register_flop_formula([_ops.selective_scan, _ops.selective_scan_train])(_flops)
register_flop_formula(_ops.selective_scan_backward)(_backward_flops)
