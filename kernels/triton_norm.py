"""LayerNorm and gate in one pass over the map, and their backward in another: Triton kernels and launches.

    out = (LayerNorm(y) weight + bias) * z sigmoid(z)

Rows are the map's pixels, D channels each; everything between loads and stores is float32. A row of z may lie in a
wider tensor (half of a projection's output), so z comes with a row stride. Gradients of weight and bias are summed by
a fixed number of programs, each over rows of its own, and added up afterwards: they repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import SIZES, on_device
from .tuning import Tuning, tuning_of


@triton.jit
def load_rows(p, i_m, i_d, stride, mask):
    return tl.load(p + i_m.to(tl.int64)[:, None] * stride + i_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise(b_y, mask, eps, D: tl.constexpr):
    """Rows with mean 0 and variance 1, and what they were divided by, inverted."""
    mean = tl.sum(b_y, 1) / D
    centred = tl.where(mask, b_y - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=SIZES)
def norm_gate_kernel(
    y, z, weight, bias, out, rows, z_stride, eps, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out [rows, D] = LayerNorm(y) * SiLU(z) for BM rows; without z LayerNorm alone."""
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    mask = (i_m < rows)[:, None] & (i_d < D)[None, :]
    b_w = tl.load(weight + i_d, mask=i_d < D, other=0.0).to(tl.float32)
    b_b = tl.load(bias + i_d, mask=i_d < D, other=0.0).to(tl.float32)
    b_n, _ = normalise(load_rows(y, i_m, i_d, D, mask), mask, eps, D)
    b_out = b_n * b_w[None, :] + b_b[None, :]
    if z is not None:
        b_z = load_rows(z, i_m, i_d, z_stride, mask)
        b_out = b_out * b_z * tl.sigmoid(b_z)
    tl.store(out + i_m.to(tl.int64)[:, None] * D + i_d[None, :], b_out, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def norm_gate_backward_kernel(
    dout, y, z, weight, bias, dy, dz, partial, out, rows, z_stride, eps,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dy, dz [rows, D], and this program's share of d weight and d bias in partial [programs, 2, D]; z may be None.

    With out [rows, D] it is written once more what the forward wrote.
    """
    pid = tl.program_id(0)
    i_d = tl.arange(0, BD)
    b_w = tl.load(weight + i_d, mask=i_d < D, other=0.0).to(tl.float32)
    b_b = tl.load(bias + i_d, mask=i_d < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BD], tl.float32)
    d_bias = tl.zeros([BD], tl.float32)
    for first in range(pid * BM, rows, tl.num_programs(0) * BM):
        i_m = first + tl.arange(0, BM)
        mask = (i_m < rows)[:, None] & (i_d < D)[None, :]
        b_n, scale = normalise(load_rows(y, i_m, i_d, D, mask), mask, eps, D)
        d_n = load_rows(dout, i_m, i_d, D, mask)
        p_row = i_m.to(tl.int64)[:, None] * D + i_d[None, :]
        affine = b_n * b_w[None, :] + b_b[None, :]
        if z is not None:
            b_z = load_rows(z, i_m, i_d, z_stride, mask)
            b_s = tl.sigmoid(b_z)
            tl.store(dz + p_row, d_n * affine * b_s * (1.0 + b_z * (1.0 - b_s)), mask=mask)
            d_n = d_n * b_z * b_s
            affine = affine * b_z * b_s
        if out is not None:
            tl.store(out + p_row, affine, mask=mask)
        d_weight += tl.sum(d_n * b_n, 0)
        d_bias += tl.sum(d_n, 0)
        d_n = d_n * b_w[None, :]
        along = tl.sum(d_n * b_n, 1) / D
        d_y = (d_n - (tl.sum(d_n, 1) / D)[:, None] - b_n * along[:, None]) * scale[:, None]
        tl.store(dy + p_row, d_y, mask=mask)
    tl.store(partial + pid * 2 * D + i_d, d_weight, mask=i_d < D)
    tl.store(partial + pid * 2 * D + D + i_d, d_bias, mask=i_d < D)


def rows_of(t: Tensor) -> tuple[Tensor, int]:
    """`t` as rows whose elements are adjacent, and their stride; copied only if it does not lie so."""
    D = t.shape[-1]
    try:
        rows = t.view(-1, D)
    except RuntimeError:
        rows = t.reshape(-1, D)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def row_tile(rows: int, D: int, tuning: Tuning) -> tuple[int, int]:
    """Rows and columns of a tile that a program holds at once."""
    BD = triton.next_power_of_2(D)
    return max(1, min(tuning.row_elements // BD, triton.next_power_of_2(rows))), BD


def forward(
    y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None,
    tuning: Tuning | None = None,
) -> Tensor:  # fmt: skip
    """`LayerNorm(y) * SiLU(z)` in z's type, or without z `LayerNorm(y)` in `dtype`."""
    D = y.shape[-1]
    out = torch.empty(y.shape, dtype=dtype if z is None else z.dtype, device=y.device)
    if out.numel() == 0:
        return out
    tuning = tuning or tuning_of(y.device)
    y_rows, _ = rows_of(y.contiguous())
    z_rows, z_stride = (None, 0) if z is None else rows_of(z)
    BM, BD = row_tile(len(y_rows), D, tuning)
    with on_device(y.device):
        norm_gate_kernel[(triton.cdiv(len(y_rows), BM),)](
            y_rows, z_rows, weight.contiguous(), bias.contiguous(), out, len(y_rows), z_stride, eps, D=D, BM=BM, BD=BD
        )
    return out


def backward(
    dout: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float, tuning: Tuning | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of y, z, weight and bias, each in its own type; into `out`, if given, what `forward` returned."""
    D = y.shape[-1]
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if dy.numel() == 0:
        return dy, dz, torch.zeros_like(weight), torch.zeros_like(bias)
    tuning = tuning or tuning_of(y.device)
    y_rows, _ = rows_of(y.contiguous())
    z_rows, z_stride = (None, 0) if z is None else rows_of(z)
    BM, BD = row_tile(len(y_rows), D, tuning)
    BM = max(1, BM // 2)
    programs = min(tuning.row_programs, triton.cdiv(len(y_rows), BM))
    partial = torch.empty(programs, 2, D, dtype=torch.float32, device=y.device)
    with on_device(y.device):
        norm_gate_backward_kernel[(programs,)](
            dout.contiguous(), y_rows, z_rows, weight.contiguous(), bias.contiguous(), dy, dz, partial, out,
            len(y_rows), z_stride, eps, D=D, BM=BM, BD=BD,
        )  # fmt: skip
    sums = partial.sum(0)
    return dy, dz, sums[0].to(weight.dtype, copy=True), sums[1].to(bias.dtype, copy=True)
