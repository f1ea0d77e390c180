"""BatchNorm of a batch's own statistics and an activation, in passes that keep nothing: Triton kernels and launches.

    y = gate activation((x - mean) rstd weight + bias)

Rows are the pixels of channels-last maps, C channels each; stats `[2, C]` are mean and 1 / sqrt(variance + eps) of x,
gate `[B, C]` is a factor for each image, or none. Everything between loads and stores is float32. Sums over pixels are
written as partial sums, one a program, and added afterwards: they repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_depthwise import activate, slope, tile
from .triton_math import SIZES, on_device
from .triton_norm import load_rows
from .tuning import tuning_of

ROWS = 256  # pixels of an image that a program sums over
PARTS = 128  # partial sums that `finish_kernel` adds at once


@triton.jit
def _sum(values, mask):
    # A product that goes into the sum directly would be rounded in one of two threads and not in the other, which
    # then hold different sums and write both.
    return tl.sum(tl.where(mask, values, 0.0), 0)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(x, partial, rows, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """partial [programs, 2, C]: mean of the program's rows, and sum of the squares of what differs from it."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_d = i_d < C
    mean = tl.zeros([BM, BD], tl.float32)
    squares = tl.zeros([BM, BD], tl.float32)
    for first in range(pid * BM, rows, programs * BM):  # Welford's sums for each row of the tile, without a reduction
        i_m = first + tl.arange(0, BM)
        mask = (i_m < rows)[:, None] & in_d[None, :]
        share = 1.0 / ((first - pid * BM) // (programs * BM) + 1).to(tl.float32)
        b_x = load_rows(x, i_m, i_d, C, mask)
        change = b_x - mean
        mean += tl.where(mask, change * share, 0.0)
        squares += tl.where(mask, change * (b_x - mean), 0.0)
    i_m = pid * BM + tl.arange(0, BM)
    counts = tl.maximum((rows - i_m + programs * BM - 1) // (programs * BM), 0).to(tl.float32)[:, None]
    b_mean = _sum(mean * (counts / tl.sum(counts)), counts > 0.0)
    shift = mean - b_mean[None, :]
    p = partial + pid * 2 * C + i_d
    tl.store(p, b_mean, mask=in_d)
    tl.store(p + C, _sum(squares + counts * shift * shift, counts > 0.0), mask=in_d)


@triton.jit
def _load_part(partial, first, i_d, rows, programs, C: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr):
    # Means and squares of some programs, and how many rows each had seen.
    i_p = first + tl.arange(0, PARTS)
    tiles = (rows + BM - 1) // BM
    counts = (tiles - i_p + programs - 1) // programs * BM
    counts -= tl.where(i_p == (tiles - 1) % programs, tiles * BM - rows, 0)
    mask = (i_p < programs)[:, None] & (i_d < C)[None, :]
    p = partial + i_p[:, None] * 2 * C + i_d[None, :]
    mean, squares = tl.load(p, mask=mask, other=0.0), tl.load(p + C, mask=mask, other=0.0)
    return mean, squares, tl.where(mask, counts.to(tl.float32)[:, None], 0.0)


@triton.jit(do_not_specialize=(*SIZES, "programs"))
def finish_kernel(
    partial, stats, running_mean, running_var, rows, programs, momentum, eps,
    C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """stats [2, C] from the partial ones, and the running statistics moved towards them, the variance unbiased."""
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)
    in_d = i_d < C
    old_mean = tl.load(running_mean + i_d, mask=in_d, other=0.0).to(tl.float32)
    old_var = tl.load(running_var + i_d, mask=in_d, other=0.0).to(tl.float32)
    tl.debug_barrier()  # several threads load the same
    mean = tl.zeros([BD], tl.float32)
    squares = tl.zeros([BD], tl.float32)
    for first in range(0, programs, PARTS):
        b_mean, _, counts = _load_part(partial, first, i_d, rows, programs, C, BM, PARTS)
        mean += _sum(b_mean * (counts / rows), counts > 0.0)
    for first in range(0, programs, PARTS):
        b_mean, b_squares, counts = _load_part(partial, first, i_d, rows, programs, C, BM, PARTS)
        shift = b_mean - mean[None, :]
        squares += _sum(b_squares + counts * shift * shift, counts > 0.0)
    tl.store(stats + i_d, mean, mask=in_d)
    tl.store(stats + C + i_d, 1.0 / tl.sqrt(squares / rows + eps), mask=in_d)
    tl.store(running_mean + i_d, momentum * mean + (1.0 - momentum) * old_mean, mask=in_d)
    tl.store(running_var + i_d, momentum * (squares / (rows - 1)) + (1.0 - momentum) * old_var, mask=in_d)


@triton.jit
def _normalise(x, stats, weight, bias, i_m, i_d, mask, C: tl.constexpr):
    # x with mean 0 and variance 1, the same times weight plus bias, and weight / deviation.
    in_d = i_d < C
    mean = tl.load(stats + i_d, mask=in_d, other=0.0)
    rstd = tl.load(stats + C + i_d, mask=in_d, other=0.0)
    b_w = tl.load(weight + i_d, mask=in_d, other=0.0).to(tl.float32)
    b_b = tl.load(bias + i_d, mask=in_d, other=0.0).to(tl.float32)
    n = (load_rows(x, i_m, i_d, C, mask) - mean[None, :]) * rstd[None, :]
    return n, n * b_w[None, :] + b_b[None, :], b_w * rstd


@triton.jit
def _before_activation(
    dout, pre, gate, shift, i_m, i_d, HW, mask, C: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    # Gradient of what is activated, from that of y and that of the activation's sum over an image.
    d = load_rows(dout, i_m, i_d, C, mask)
    if gate is not None:
        d = d * load_rows(gate, i_m // HW, i_d, C, mask) + load_rows(shift, i_m // HW, i_d, C, mask)
    return tl.where(mask, d * slope(pre, ACTIVATION), 0.0)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_kernel(
    x, stats, weight, bias, gate, out, rows, HW, C: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """out [rows, C] = y for BM rows and BD channels."""
    blocks: tl.constexpr = (C + BD - 1) // BD
    i_m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    i_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    mask = (i_m < rows)[:, None] & (i_d < C)[None, :]
    _, pre, _ = _normalise(x, stats, weight, bias, i_m, i_d, mask, C)
    value = activate(pre, ACTIVATION)
    if gate is not None:
        value *= load_rows(gate, i_m // HW, i_d, C, mask)
    tl.store(out + i_m.to(tl.int64)[:, None] * C + i_d[None, :], value, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_pool_kernel(
    x, stats, weight, bias, factor, partial, HW, chunks, C: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """partial [B, chunks, C]: sums over ROWS pixels of an image of what was activated, times factor if there is one."""
    pid = tl.program_id(0)
    b, chunk = pid // chunks, pid % chunks
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.zeros([BM, BD], tl.float32)
    for first in range(chunk * ROWS, min((chunk + 1) * ROWS, HW), BM):
        i_m = first + tl.arange(0, BM)
        mask = (i_m < HW)[:, None] & (i_d < C)[None, :]
        rows = b.to(tl.int64) * HW + i_m
        _, pre, _ = _normalise(x, stats, weight, bias, rows, i_d, mask, C)
        value = activate(pre, ACTIVATION)
        if factor is not None:
            value *= load_rows(factor, rows, i_d, C, mask)
        sums += tl.where(mask, value, 0.0)
    tl.store(partial + pid.to(tl.int64) * C + i_d, tl.sum(sums, 0), mask=i_d < C)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_sums_kernel(
    dout, x, stats, weight, bias, gate, shift, partial, rows, HW, C: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """This program's share of d bias and d weight in partial [programs, 2, C]."""
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    d_bias = tl.zeros([BM, BD], tl.float32)
    d_weight = tl.zeros([BM, BD], tl.float32)
    for first in range(tl.program_id(0) * BM, rows, tl.num_programs(0) * BM):
        i_m = first + tl.arange(0, BM)
        mask = (i_m < rows)[:, None] & (i_d < C)[None, :]
        n, pre, _ = _normalise(x, stats, weight, bias, i_m, i_d, mask, C)
        d = _before_activation(dout, pre, gate, shift, i_m, i_d, HW, mask, C, ACTIVATION)
        d_bias += d
        d_weight += d * n
    p = partial + tl.program_id(0) * 2 * C + i_d
    tl.store(p, tl.sum(d_bias, 0), mask=i_d < C)
    tl.store(p + C, tl.sum(d_weight, 0), mask=i_d < C)


@triton.jit(do_not_specialize=SIZES)
def batch_norm_gradient_kernel(
    dout, x, stats, weight, bias, gate, shift, sums, dx, out, rows, HW, C: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx [rows, C] from sums [2, C], d bias and d weight; with out [rows, C] y once more."""
    blocks: tl.constexpr = (C + BD - 1) // BD
    i_m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    i_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    in_d = i_d < C
    mask = (i_m < rows)[:, None] & in_d[None, :]
    n, pre, scale = _normalise(x, stats, weight, bias, i_m, i_d, mask, C)
    d = _before_activation(dout, pre, gate, shift, i_m, i_d, HW, mask, C, ACTIVATION)
    d_bias = tl.load(sums + i_d, mask=in_d, other=0.0) / rows
    d_weight = tl.load(sums + C + i_d, mask=in_d, other=0.0) / rows
    p_row = i_m.to(tl.int64)[:, None] * C + i_d[None, :]
    tl.store(dx + p_row, (d - d_bias[None, :] - n * d_weight[None, :]) * scale[None, :], mask=mask)
    if out is not None:
        value = activate(pre, ACTIVATION)
        if gate is not None:
            value *= load_rows(gate, i_m // HW, i_d, C, mask)
        tl.store(out + p_row, value, mask=mask)


def _programs(device: torch.device, rows: int, C: int) -> int:
    # Of each block of channels.
    BM, BD = tile(C)
    return min(triton.cdiv(tuning_of(device).row_programs, triton.cdiv(C, BD)), triton.cdiv(rows, BM))


def statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float) -> Tensor:
    """stats of x `[B, H, W, C]`, float32 `[2, C]`; moves the running ones, in place, by `momentum` towards them."""
    *_, C = x.shape
    x = x.contiguous()
    rows, (BM, BD) = x.numel() // C, tile(C)
    programs = _programs(x.device, rows, C)
    partial = torch.empty(programs, 2, C, dtype=torch.float32, device=x.device)
    stats = torch.empty(2, C, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        statistics_kernel[(programs, triton.cdiv(C, BD))](x, partial, rows, C=C, BM=BM, BD=BD)
        finish_kernel[(triton.cdiv(C, 32),)](
            partial, stats, running_mean, running_var, rows, programs, momentum, eps, C=C, BM=BM, BD=32, PARTS=PARTS
        )
    return stats


def forward(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """y `[B, H, W, C]` in x's type."""
    _, H, W, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, (BM, BD) = x.numel() // C, tile(C)
    with on_device(x.device):
        batch_norm_kernel[(triton.cdiv(rows, BM) * triton.cdiv(C, BD),)](
            x.contiguous(), stats, weight, bias, gate, out, rows, H * W, C=C, ACTIVATION=activation, BM=BM, BD=BD
        )
    return out


def pool(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, factor: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """Sums over the pixels of y without its gate, times factor `[B, H, W, C]` if there is one: float32 `[B, C]`."""
    B, H, W, C = x.shape
    HW, (BM, BD) = H * W, tile(C)
    chunks = triton.cdiv(HW, ROWS)
    partial = torch.empty(B, chunks, C, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        batch_norm_pool_kernel[(B * chunks, triton.cdiv(C, BD))](
            x.contiguous(), stats, weight, bias, None if factor is None else factor.contiguous(), partial, HW, chunks,
            C=C, ACTIVATION=activation, ROWS=ROWS, BM=BM, BD=BD,
        )  # fmt: skip
    return partial.sum(1)


def backward(
    dout: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, shift: Tensor | None,
    activation: str, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (through its statistics too), weight and bias, each in its own type, from that of y.

    shift, float32 `[B, C]`, comes with a gate: the gradient of what `pool` sums without factor. Into `out`, if given,
    y is written.
    """
    _, H, W, C = x.shape
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, (BM, BD) = x.numel() // C, tile(C)
    programs = _programs(x.device, rows, C)
    partial = torch.empty(programs, 2, C, dtype=torch.float32, device=x.device)
    given = (dout, x, stats, weight, bias, gate, shift)
    sizes = {"C": C, "ACTIVATION": activation, "BM": BM, "BD": BD}
    with on_device(x.device):
        batch_norm_sums_kernel[(programs, triton.cdiv(C, BD))](*given, partial, rows, H * W, **sizes)
        sums = partial.sum(0)
        batch_norm_gradient_kernel[(triton.cdiv(rows, BM) * triton.cdiv(C, BD),)](
            *given, sums, dx, out, rows, H * W, **sizes
        )
    return dx, sums[1].to(weight.dtype, copy=True), sums[0].to(bias.dtype, copy=True)
