"""The scan's input projections as GEMMs that gather their rows in scan order, and the two GEMMs of their backward.

One row of `proj` [K, B, Lp, S] float32 holds what one token needs: N pairs (B, C), then the R numbers that dt_proj
turns into the step size, then zeros up to S, a multiple of 4. Column j comes from row `_weight_row(j)` of
x_proj_weight, whose rows are (dt [R], B [N], C [N]). Padding tokens give rows of zeros.
"""

import triton
import triton.language as tl

from .triton_math import SIZES, load_rounded


def projection_width(N: int, R: int) -> int:
    """S: floats in a row of `proj`."""
    return 2 * N + (R + 3) // 4 * 4


def gradient_width(N: int, R: int, bytes_each: int) -> int:
    """SG: numbers in a row of `dproj`, so many that every row begins at 16 bytes, which one load takes."""
    together = 16 // bytes_each
    return (2 * N + R + together - 1) // together * together


@triton.jit(do_not_specialize=SIZES)
def paths_kernel(table, H, W, L, LP, GROUPS: tl.constexpr, STEP: tl.constexpr, BT: tl.constexpr):
    """table[k, t] = pixel of token t of group k (Pattern.paths), -1 for padding, from L on, and in the last row.

    GROUPS holds (first row, first column, down, backwards) of every group.
    """
    k = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    rows = (H + STEP - 1) // STEP
    columns = (W + STEP - 1) // STEP
    pixel = tl.full([BT], -1, tl.int32)
    for group in tl.static_range(len(GROUPS)):
        i = L - 1 - t if GROUPS[group][3] else t
        row = STEP * (i % rows if GROUPS[group][2] else i // columns) + GROUPS[group][0]
        column = STEP * (i // rows if GROUPS[group][2] else i % columns) + GROUPS[group][1]
        is_pixel = (t < L) & (row < H) & (column < W) & (k == group)
        pixel = tl.where(is_pixel, row * W + column, pixel)
    tl.store(table + k * LP + t, pixel, mask=t < LP)


@triton.jit
def _weight_row(column, N: tl.constexpr, R: tl.constexpr):
    return tl.where(column < 2 * N, R + (column % 2) * N + column // 2, column - 2 * N)


@triton.jit
def _pixel_offsets(table, i_m, k, M, LP, HW, D):
    # Element offset of each token's pixel in x, and whether the token is a pixel at all.
    p = tl.load(table + k * LP + i_m % LP, mask=i_m < M, other=-1)
    return ((i_m // LP).to(tl.int64) * HW + p) * D, p >= 0


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    x, weight, table, proj, M, LP, HW,
    D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, HALF_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """proj[k, m, :] = x[pixel(k, m), :] @ x_proj_weight[k]^T for M = B * Lp tokens of each group.

    The weight is rounded to x's type. HALF_DOT multiplies half types as they are (Triton's interpreter cannot).
    """
    k = tl.program_id(1)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_s = tl.program_id(2) * BS + tl.arange(0, BS)
    offsets, is_pixel = _pixel_offsets(table, i_m, k, M, LP, HW, D)
    rows = k * (R + 2 * N) + _weight_row(i_s, N, R)
    acc = tl.zeros([BM, BS], tl.float32)
    for d in range(0, D, BK):
        i_d = d + tl.arange(0, BK)
        b_x = tl.load(x + offsets[:, None] + i_d[None, :], mask=is_pixel[:, None] & (i_d < D)[None, :], other=0.0)
        in_weight = (i_s < 2 * N + R)[:, None] & (i_d < D)[None, :]
        b_w = tl.load(weight + rows[:, None] * D + i_d[None, :], mask=in_weight, other=0.0).to(b_x.dtype)
        if not HALF_DOT:
            b_x = b_x.to(tl.float32)
            b_w = b_w.to(tl.float32)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)
    out = proj + (k.to(tl.int64) * M + i_m)[:, None] * S + i_s[None, :]
    tl.store(out, acc, mask=(i_m < M)[:, None] & (i_s < S)[None, :])


@triton.jit
def _sum_blocks(
    dproj, i_m, i_s, k, M,
    K: tl.constexpr, SG: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    # A tile of dproj [NB, K, M, SG], summed over the blocks of channels that the scan's programs wrote. Columns from
    # 2N + R on were never written; to leave them out here would cut the loads into single numbers.
    mask = (i_m < M)[:, None] & (i_s < SG)[None, :]
    p_g = dproj + (k.to(tl.int64) * M + i_m)[:, None] * SG + i_s[None, :]
    b_g = tl.load(p_g, mask=mask, other=0.0).to(tl.float32)
    for block in range(1, NB):
        b_g += tl.load(p_g + block * (tl.cast(M, tl.int64) * K * SG), mask=mask, other=0.0).to(tl.float32)
    return b_g


@triton.jit(do_not_specialize=SIZES)
def input_gradient_kernel(
    dproj, weight, table, dx_scan, dx, M, LP, HW,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SG: tl.constexpr,
    NB: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, PER_GROUP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[pixel(k, m), :] = dx_scan[pixel(k, m), :] + dproj[k, m, :] @ x_proj_weight[k]; PER_GROUP: one map a group.

    The weight is rounded to DTYPE, x's type, as in the forward.
    """
    k = tl.program_id(1)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_d = tl.program_id(2) * BD + tl.arange(0, BD)
    offsets, is_pixel = _pixel_offsets(table, i_m, k, M, LP, HW, D)
    if PER_GROUP:
        offsets += k.to(tl.int64) * (M // LP) * HW * D
    acc = tl.zeros([BM, BD], tl.float32)
    for s in range(0, S, BS):
        i_s = s + tl.arange(0, BS)
        b_g = tl.where((i_s < 2 * N + R)[None, :], _sum_blocks(dproj, i_m, i_s, k, M, K, SG, NB), 0.0)
        rows = k * (R + 2 * N) + _weight_row(i_s, N, R)
        in_weight = (i_s < 2 * N + R)[:, None] & (i_d < D)[None, :]
        b_w = load_rounded(weight + rows[:, None] * D + i_d[None, :], in_weight, DTYPE)
        acc = tl.dot(b_g, b_w, acc, input_precision=PRECISION)
    mask = is_pixel[:, None] & (i_d < D)[None, :]
    out = offsets[:, None] + i_d[None, :]
    acc += tl.load(dx_scan + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + out, acc, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    dproj, x, table, partial, M, LP, HW, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SG: tl.constexpr,
    NB: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, NS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[split, k, row, :] = sum over a split's tokens of dproj[k, m, column(row)] * x[pixel(k, m), :]."""
    k = tl.program_id(1)
    split = tl.program_id(0)
    i_s = (tl.program_id(2) % NS) * BS + tl.arange(0, BS)
    i_d = (tl.program_id(2) // NS) * BD + tl.arange(0, BD)
    acc = tl.zeros([BS, BD], tl.float32)
    for m in range(split * tokens, min((split + 1) * tokens, M), BM):
        i_m = m + tl.arange(0, BM)
        offsets, is_pixel = _pixel_offsets(table, i_m, k, M, LP, HW, D)
        b_g = _sum_blocks(dproj, i_m, i_s, k, M, K, SG, NB)
        b_x = tl.load(x + offsets[:, None] + i_d[None, :], mask=is_pixel[:, None] & (i_d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_g), b_x.to(tl.float32), acc, input_precision=PRECISION)
    rows = (split * tl.num_programs(1) + k) * (R + 2 * N) + _weight_row(i_s, N, R)
    mask = (i_s < 2 * N + R)[:, None] & (i_d < D)[None, :]
    tl.store(partial + rows[:, None] * D + i_d[None, :], acc, mask=mask)
