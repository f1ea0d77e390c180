"""Squeeze-excitations: an InRes block's, and the tail of an EVSS block with both branches and the sum."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import NAMESPACE, cpu_kernels, numba_around


def _kernels() -> Any:
    return importlib.import_module(".triton_squeeze", __package__)


def squeeze_and_excite(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """`x sigmoid(W2 relu(W1 mean(x) + b1) + b2)`, the mean over H and W.

    x `[B, H, W, C]`; w1 `[S, C, 1, 1]`, b1 `[S]`, w2 `[C, S, 1, 1]`, b2 `[C]`, as those of 1x1 convolutions. Raises
    ValueError for shapes that do not fit together.
    """
    C, S = x.shape[-1], len(w1)
    biases = (b1 is None or b1.shape == (S,)) and (b2 is None or b2.shape == (C,))
    if w1.shape != (S, C, 1, 1) or w2.shape != (C, S, 1, 1) or not biases:
        shapes = [None if t is None else list(t.shape) for t in (w1, b1, w2, b2)]
        raise ValueError(f"w1, b1, w2 and b2 must be [S, {C}, 1, 1], [S], [{C}, S, 1, 1] and [{C}], got {shapes}")
    if b1 is not None and b2 is not None and (kernels := cpu_kernels(x, C, w1, b1, w2, b2)):
        return kernels.squeeze_and_excite(x, w1, b1, w2, b2)
    u = x.permute(0, 3, 1, 2)
    hidden = F.relu(F.linear(F.adaptive_avg_pool2d(u, 1).flatten(1), w1.flatten(1), b1))
    return x * F.linear(hidden, w2.flatten(1), b2).sigmoid()[:, None, None]


def squeeze_excite_add(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    keep: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`x + keep (u gate(u) + v gate(v))`, `gate(m) = sigmoid(W2 gelu(W1 mean(LayerNorm(m)) + b1) + b2)`.

    x, u, v `[B, H, W, C]` float32, bfloat16 or float16; LayerNorm's weight and bias `[C]`; w1 `[S, C]`, b1 `[S]`,
    w2 `[C, S]`, b2 `[C]`; keep `[B]`, a factor for each sample's branches (stochastic depth), None for one. The mean is
    over H and W. All arithmetic is float32; the result has the wider type of x and u. Differentiable once, but for
    keep. For tensors that `ops.has_kernels` is true of. Raises ValueError for shapes that do not fit together.
    """
    C, S = x.shape[-1], len(b1)
    tensors = (x, u, v, norm_weight, norm_bias, w1, b1, w2, b2, keep)
    fits = u.shape == x.shape == v.shape and norm_weight.shape == norm_bias.shape == b2.shape == (C,)
    if not fits or w1.shape != (S, C) or w2.shape != (C, S) or (keep is not None and keep.shape != x.shape[:1]):
        shapes = [list(t.shape) for t in tensors if t is not None]
        raise ValueError(f"x, u and v must have one shape and the gate's tensors fit their {C} channels, got {shapes}")
    if kernels := cpu_kernels(x, C, *tensors[1:]):
        return kernels.squeeze_excite_add(*tensors, eps)[0]
    return fused_squeeze_excite_add(*tensors, eps)[0]


@torch.library.custom_op(f"{NAMESPACE}::squeeze_excite_add", mutates_args=())
def fused_squeeze_excite_add(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    keep: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels behind `squeeze_excite_add`, with what its backward needs: float32 `[B, 2, C]` twice."""
    if numba := numba_around(x):
        return numba.squeeze_excite_add(x, u, v, norm_weight, norm_bias, w1, b1, w2, b2, keep, eps)
    return _kernels().forward(x, u, v, norm_weight, norm_bias, w1, b1, w2, b2, keep, eps)


@torch.library.custom_op(f"{NAMESPACE}::gate_gradients", mutates_args=())
def gate_gradients(dout: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Sums over the pixels of dout u and dout v: float32 `[B, 2, C]`."""
    return _kernels().gate_gradients(dout, u, v)


@torch.library.custom_op(f"{NAMESPACE}::branch_gradients", mutates_args=())
def branch_gradients(
    dout: Tensor, u: Tensor, v: Tensor, gates: Tensor, d_mean: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of u and v by those of their gated sum and of the means of their normalised maps."""
    return _kernels().branch_gradients(dout, u, v, gates, d_mean, eps)


@fused_squeeze_excite_add.register_fake
def _(x, u, v, norm_weight, norm_bias, w1, b1, w2, b2, keep, eps):
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, u.dtype))
    mean, gates = (x.new_empty((x.shape[0], 2, x.shape[3]), dtype=torch.float32) for _ in range(2))
    return out, mean, gates


@gate_gradients.register_fake
def _(dout, u, v):
    return u.new_empty((u.shape[0], 2, u.shape[3]), dtype=torch.float32)


@branch_gradients.register_fake
def _(dout, u, v, gates, d_mean, eps):
    return u.new_empty(u.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *tensors, ctx.eps = inputs
    ctx.type_of_x = x.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple:
    if dout is None:
        return (None,) * 11
    u, v, norm_weight, norm_bias, w1, b1, w2, b2, keep, mean, gates = ctx.saved_tensors
    with torch.autocast(dout.device.type, enabled=False):
        # The gates' own network is tiny: [2 B, C] rows. `.float()` gives the widest there is to weights of half types.
        scale, shift, W1, W2 = (t.float() for t in (norm_weight, norm_bias, w1, w2))
        squeezed = mean * scale + shift
        hidden = F.linear(squeezed, W1, b1.float())
        active = F.gelu(hidden)
        gate = torch.sigmoid(F.linear(active, W2, b2.float()))
        d_gate = gate_gradients(dout, u, v)
        if keep is not None:
            d_gate = d_gate * keep.float()[:, None, None]
        d_out = d_gate * gate * (1 - gate)
        d_hidden = torch.ops.aten.gelu_backward(d_out @ W2, hidden)
        d_squeezed = d_hidden @ W1
        d_w1, d_w2 = (d.flatten(0, 1).mT @ of.flatten(0, 1) for d, of in ((d_hidden, squeezed), (d_out, active)))
        du, dv = branch_gradients(dout, u, v, gates, d_squeezed * scale, ctx.eps)
        d_norm, d_norm_bias, d_b1, d_b2 = (d.sum((0, 1)) for d in (d_squeezed * mean, d_squeezed, d_hidden, d_out))
        gradients = (d_norm, d_norm_bias, d_w1, d_b1, d_w2, d_b2)
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2)
    of_parameters = (d.to(parameter.dtype) for d, parameter in zip(gradients, parameters, strict=True))
    return dout.to(ctx.type_of_x), du, dv, *of_parameters, None, None


fused_squeeze_excite_add.register_autograd(_backward, setup_context=_save_for_backward)
