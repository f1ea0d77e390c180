"""The tail of an EVSS block in three passes, and its backward in two: Triton kernels and launches.

    out = x + keep (u gate(u) + v gate(v)),  gate(m) = sigmoid(W2 gelu(W1 mean(LayerNorm(m)) + b1) + b2)

Rows are pixels, C channels each; everything between loads and stores is float32. What is kept for the backward, beside
the inputs, are the means over pixels of the normalised maps before LayerNorm's weight and bias, `[B, 2, C]`, and the
gates with `keep`. Sums over pixels are written as partial sums, one a program, and added afterwards: they repeat bit
for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import SIZES, normal_cdf, on_device
from .triton_norm import normalise, row_tile
from .tuning import tuning_of

ROWS = 256  # pixels that a program sums over


@triton.jit
def _load_tile(p, b, i_m, i_d, HW, mask, C: tl.constexpr):
    rows = b.to(tl.int64) * HW + i_m
    return tl.load(p + rows[:, None] * C + i_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(p, b, i_m, i_d, HW, mask, value, C: tl.constexpr):
    rows = b.to(tl.int64) * HW + i_m
    tl.store(p + rows[:, None] * C + i_d[None, :], value, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def squeeze_kernel(
    u, v, partial, HW, chunks, eps, C: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """partial [B, chunks, 2, C]: sums of the normalised u and v over ROWS pixels."""
    pid = tl.program_id(0)
    b, chunk = pid // chunks, pid % chunks
    i_d = tl.arange(0, BD)
    sum_u = tl.zeros([BD], tl.float32)
    sum_v = tl.zeros([BD], tl.float32)
    for first in range(chunk * ROWS, min((chunk + 1) * ROWS, HW), BM):
        i_m = first + tl.arange(0, BM)
        mask = (i_m < HW)[:, None] & (i_d < C)[None, :]
        n_u, _ = normalise(_load_tile(u, b, i_m, i_d, HW, mask, C), mask, eps, C)
        n_v, _ = normalise(_load_tile(v, b, i_m, i_d, HW, mask, C), mask, eps, C)
        sum_u += tl.sum(n_u, 0)
        sum_v += tl.sum(n_v, 0)
    p = partial + pid.to(tl.int64) * 2 * C + i_d
    tl.store(p, sum_u, mask=i_d < C)
    tl.store(p + C, sum_v, mask=i_d < C)


@triton.jit(do_not_specialize=SIZES)
def excite_kernel(
    partial, norm_weight, norm_bias, w1, b1, w2, b2, keep, mean, gates, HW, chunks,
    C: tl.constexpr, HIDDEN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """mean and gates [B, 2, C] of one image and branch."""
    pid = tl.program_id(0)
    i_d = tl.arange(0, BD)
    in_d = i_d < C
    b_m = tl.zeros([BD], tl.float32)
    p = partial + ((pid // 2).to(tl.int64) * chunks * 2 + pid % 2) * C + i_d
    for chunk in range(chunks):
        b_m += tl.load(p + chunk * 2 * C, mask=in_d, other=0.0)
    b_m = b_m / HW
    tl.store(mean + pid * C + i_d, b_m, mask=in_d)
    b_w = tl.load(norm_weight + i_d, mask=in_d, other=0.0).to(tl.float32)
    b_s = b_m * b_w + tl.load(norm_bias + i_d, mask=in_d, other=0.0).to(tl.float32)
    out = tl.load(b2 + i_d, mask=in_d, other=0.0).to(tl.float32)
    for h in range(HIDDEN):
        row = tl.load(w1 + h * C + i_d, mask=in_d, other=0.0).to(tl.float32)
        hidden = tl.sum(b_s * row, 0) + tl.load(b1 + h).to(tl.float32)
        hidden = hidden * normal_cdf(hidden)
        out += hidden * tl.load(w2 + i_d * HIDDEN + h, mask=in_d, other=0.0).to(tl.float32)
    gate = tl.sigmoid(out)
    if keep is not None:
        gate *= tl.load(keep + pid // 2).to(tl.float32)
    tl.store(gates + pid * C + i_d, gate, mask=in_d)


@triton.jit(do_not_specialize=SIZES)
def gated_add_kernel(
    x, u, v, gates, out, HW, chunks, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out = x + u gates[0] + v gates[1] for BM pixels of an image."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i_m, i_d = chunk * BM + tl.arange(0, BM), tl.arange(0, BD)
    mask = (i_m < HW)[:, None] & (i_d < C)[None, :]
    p_gate = gates + b * 2 * C + i_d
    gate_u = tl.load(p_gate, mask=i_d < C, other=0.0)
    gate_v = tl.load(p_gate + C, mask=i_d < C, other=0.0)
    value = _load_tile(x, b, i_m, i_d, HW, mask, C)
    value += _load_tile(u, b, i_m, i_d, HW, mask, C) * gate_u[None, :]
    value += _load_tile(v, b, i_m, i_d, HW, mask, C) * gate_v[None, :]
    _store_tile(out, b, i_m, i_d, HW, mask, value, C)


@triton.jit(do_not_specialize=SIZES)
def gate_gradient_kernel(
    dout, u, v, partial, HW, chunks, C: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """partial [B, chunks, 2, C]: sums of dout u and dout v over ROWS pixels."""
    pid = tl.program_id(0)
    b, chunk = pid // chunks, pid % chunks
    i_d = tl.arange(0, BD)
    sum_u = tl.zeros([BD], tl.float32)
    sum_v = tl.zeros([BD], tl.float32)
    for first in range(chunk * ROWS, min((chunk + 1) * ROWS, HW), BM):
        i_m = first + tl.arange(0, BM)
        mask = (i_m < HW)[:, None] & (i_d < C)[None, :]
        b_do = _load_tile(dout, b, i_m, i_d, HW, mask, C)
        sum_u += tl.sum(b_do * _load_tile(u, b, i_m, i_d, HW, mask, C), 0)
        sum_v += tl.sum(b_do * _load_tile(v, b, i_m, i_d, HW, mask, C), 0)
    p = partial + pid.to(tl.int64) * 2 * C + i_d
    tl.store(p, sum_u, mask=i_d < C)
    tl.store(p + C, sum_v, mask=i_d < C)


@triton.jit
def _branch_gradient(b_do, u, gates, d_mean, b, i_m, i_d, HW, mask, eps, C: tl.constexpr):
    # Through the gated map, and through the LayerNorm whose mean made the gate.
    n, scale = normalise(_load_tile(u, b, i_m, i_d, HW, mask, C), mask, eps, C)
    gate = tl.load(gates + i_d, mask=i_d < C, other=0.0)
    d_n = tl.load(d_mean + i_d, mask=i_d < C, other=0.0) / HW
    along = tl.sum(n * d_n[None, :], 1) / C
    return b_do * gate[None, :] + (d_n[None, :] - tl.sum(d_n, 0) / C - n * along[:, None]) * scale[:, None]


@triton.jit(do_not_specialize=SIZES)
def branch_gradient_kernel(
    dout, u, v, gates, d_mean, du, dv, HW, chunks, eps, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """du and dv for BM pixels of an image; d_mean [B, 2, C] is the gradient of the normalised maps' means."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i_m, i_d = chunk * BM + tl.arange(0, BM), tl.arange(0, BD)
    mask = (i_m < HW)[:, None] & (i_d < C)[None, :]
    b_do = _load_tile(dout, b, i_m, i_d, HW, mask, C)
    of_u, of_v = b * 2 * C, b * 2 * C + C
    d_u = _branch_gradient(b_do, u, gates + of_u, d_mean + of_u, b, i_m, i_d, HW, mask, eps, C)
    _store_tile(du, b, i_m, i_d, HW, mask, d_u, C)
    d_v = _branch_gradient(b_do, v, gates + of_v, d_mean + of_v, b, i_m, i_d, HW, mask, eps, C)
    _store_tile(dv, b, i_m, i_d, HW, mask, d_v, C)


def forward(
    x: Tensor, u: Tensor, v: Tensor, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor, keep: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The block's result `[B, H, W, C]` in the wider type of x and u, the means and the gates, float32 `[B, 2, C]`."""
    B, H, W, C = x.shape
    HW, BM, BD = H * W, *row_tile(H * W, C, tuning_of(x.device))
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, u.dtype), device=x.device)
    mean, gates = (torch.empty(B, 2, C, dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel() == 0:
        return out, mean, gates
    x, u, v = x.contiguous(), u.contiguous(), v.contiguous()
    chunks = triton.cdiv(HW, ROWS)
    partial = torch.empty(B, chunks, 2, C, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        squeeze_kernel[(B * chunks,)](u, v, partial, HW, chunks, eps, C=C, ROWS=ROWS, BM=min(BM, ROWS), BD=BD)
        excite_kernel[(2 * B,)](
            partial, norm_weight, norm_bias, w1.contiguous(), b1, w2.contiguous(), b2, keep, mean, gates, HW, chunks,
            C=C, HIDDEN=len(b1), BD=BD, num_warps=1 if BD <= 256 else 4,
        )  # fmt: skip
        chunks = triton.cdiv(HW, BM)
        gated_add_kernel[(B * chunks,)](x, u, v, gates, out, HW, chunks, C=C, BM=BM, BD=BD)
    return out, mean, gates


def gate_gradients(dout: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Sums over the pixels of dout u and dout v: float32 `[B, 2, C]`."""
    B, H, W, C = u.shape
    HW, BM, BD = H * W, *row_tile(H * W, C, tuning_of(u.device))
    chunks = triton.cdiv(HW, ROWS)
    partial = torch.empty(B, chunks, 2, C, dtype=torch.float32, device=u.device)
    if partial.numel():
        with on_device(u.device):
            gate_gradient_kernel[(B * chunks,)](
                dout.contiguous(), u.contiguous(), v.contiguous(), partial, HW, chunks,
                C=C, ROWS=ROWS, BM=min(BM, ROWS), BD=BD,
            )  # fmt: skip
    return partial.sum(1)


def branch_gradients(
    dout: Tensor, u: Tensor, v: Tensor, gates: Tensor, d_mean: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of u and v, each in its own type."""
    B, H, W, C = u.shape
    du, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, v))
    if du.numel() == 0:
        return du, dv
    HW, BM, BD = H * W, *row_tile(H * W, C, tuning_of(u.device))
    BM = max(1, BM // 2)
    chunks = triton.cdiv(HW, BM)
    with on_device(u.device):
        branch_gradient_kernel[(B * chunks,)](
            dout.contiguous(), u.contiguous(), v.contiguous(), gates.contiguous(), d_mean.contiguous(), du, dv,
            HW, chunks, eps, C=C, BM=BM, BD=BD,
        )  # fmt: skip
    return du, dv
