"""Depthwise 3x3 convolution of channels-last maps with bias and activation in one pass, and its backward in two.

Rows are pixels; those of the input may lie in a wider tensor, so they come with a stride. Weights are rounded to the
map's type, as PyTorch's convolutions have them; sums are float32 and rounded once. Gradients of weight and bias are
summed by a fixed number of programs and added up afterwards: they repeat bit for bit.
"""

# ruff: noqa: RUF005 (Triton joins tuples with +)
# mypy: disable-error-code="assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import DTYPES, LOG2E, SIZES, load_rounded, normal_cdf, on_device
from .triton_norm import rows_of
from .tuning import tuning_of

TILE = 1024  # elements a program holds at once


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        v = v * normal_cdf(v)
    return v


@triton.jit
def slope(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        s = tl.where(v > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(v)
        s = sigmoid * (1.0 + v * (1.0 - sigmoid))
    else:
        s = normal_cdf(v) + v * 0.3989422804014327 * tl.exp2(v * v * -0.5 * LOG2E)
    return s


@triton.jit
def _load_tap(x, i_m, i_d, tap: tl.constexpr, rows, H, W, stride, in_d):
    # The pixel that tap (row tap // 3, column tap % 3 of the kernel) sees; zero outside of the image.
    down: tl.constexpr = tap // 3 - 1
    right: tl.constexpr = tap % 3 - 1
    column = i_m % W + right
    row = (i_m // W) % H + down
    inside = (i_m < rows) & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    pixel = (i_m + down * W + right).to(tl.int64)
    return tl.load(x + pixel[:, None] * stride + i_d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _convolve(x, weight, i_m, i_d, rows, H, W, stride, in_d, FLIP: tl.constexpr, DTYPE: tl.constexpr):
    acc = tl.zeros([i_m.shape[0], i_d.shape[0]], tl.float32)
    for tap in tl.static_range(9):
        b_w = load_rounded(weight + i_d * 9 + (8 - tap if FLIP else tap), in_d, DTYPE)
        acc += _load_tap(x, i_m, i_d, tap, rows, H, W, stride, in_d) * b_w[None, :]
    return acc


@triton.jit(do_not_specialize=SIZES)
def depthwise_kernel(
    x, weight, bias, out, rows, H, W, x_stride, C: tl.constexpr, ACTIVATION: tl.constexpr, FLIP: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [rows, C] = activation(x * weight + bias) for BM pixels and BD channels; FLIP turns the kernel around."""
    blocks: tl.constexpr = (C + BD - 1) // BD
    i_m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    i_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    in_d = i_d < C
    acc = _convolve(x, weight, i_m, i_d, rows, H, W, x_stride, in_d, FLIP, DTYPE)
    if bias is not None:
        acc += load_rounded(bias + i_d, in_d, DTYPE)[None, :]
    p_out = out + i_m.to(tl.int64)[:, None] * C + i_d[None, :]
    tl.store(p_out, activate(acc, ACTIVATION), mask=(i_m < rows)[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=SIZES)
def depthwise_gradient_kernel(
    dout, x, weight, bias, dpre, partial, rows, H, W, x_stride, C: tl.constexpr, ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dpre [rows, C], the gradient before the activation, where there is one, and this program's share of d weight and
    d bias in partial [programs, 10, C].
    """
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = i_d < C
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros([BM, BD], tl.float32),)
    for first in range(tl.program_id(0) * BM, rows, tl.num_programs(0) * BM):
        i_m = first + tl.arange(0, BM)
        mask = (i_m < rows)[:, None] & in_d[None, :]
        p_row = i_m.to(tl.int64)[:, None] * C + i_d[None, :]
        b_g = tl.load(dout + p_row, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            pre = _convolve(x, weight, i_m, i_d, rows, H, W, x_stride, in_d, False, DTYPE)
            if bias is not None:
                pre += load_rounded(bias + i_d, in_d, DTYPE)[None, :]
            b_g *= slope(pre, ACTIVATION)
            tl.store(dpre + p_row, b_g, mask=mask)
        new = ()
        for tap in tl.static_range(9):
            new = new + (sums[tap] + b_g * _load_tap(x, i_m, i_d, tap, rows, H, W, x_stride, in_d),)
        sums = new + (sums[9] + b_g,)
    for i in tl.static_range(10):
        tl.store(partial + (tl.program_id(0) * 10 + i) * C + i_d, tl.sum(sums[i], 0), mask=in_d)


def tile(C: int) -> tuple[int, int]:
    # The widest block of channels that leaves no lane without one, and at least a memory sector of a half type.
    BD = next((width for width in (64, 32) if C % width == 0), 16)
    return TILE // BD, BD


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`[B, H, W, C]`, contiguous, in x's type."""
    return _convolution(x, weight, bias, activation, flip=False)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, flip: bool) -> Tensor:
    _, H, W, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, stride = rows_of(x)
    BM, BD = tile(C)
    with on_device(x.device):
        depthwise_kernel[(triton.cdiv(len(rows), BM) * triton.cdiv(C, BD),)](
            rows, weight.contiguous(), bias, out, len(rows), H, W, stride, C=C, ACTIVATION=activation, FLIP=flip,
            DTYPE=DTYPES[x.dtype], BM=BM, BD=BD,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own type; the bias's in the weight's where there is no bias."""
    _, H, W, C = x.shape
    dout = dout.contiguous()
    if dout.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(weight), weight.new_zeros(C)
    rows, stride = rows_of(x)
    BM, BD = tile(C)
    programs = min(tuning_of(x.device).row_programs, triton.cdiv(len(rows), BM))
    dpre = dout if activation == "none" else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, 10, C, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        depthwise_gradient_kernel[(programs, triton.cdiv(C, BD))](
            dout, rows, weight.contiguous(), bias, dpre, partial, len(rows), H, W, stride, C=C, ACTIVATION=activation,
            DTYPE=DTYPES[x.dtype], BM=BM, BD=BD,
        )  # fmt: skip
    sums = partial.sum(0)
    d_bias = sums[9].to(weight.dtype if bias is None else bias.dtype, copy=True)
    d_weight = sums[:9].T.reshape(weight.shape).to(weight.dtype)
    return _convolution(dpre, weight, None, "none", flip=True).to(x.dtype), d_weight, d_bias
