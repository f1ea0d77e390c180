"""Backward scan kernel: from the last token to the first, eight tokens at a time, with everything in registers.

With g_t the gradient of the state h_t and q_t = exp(delta_t A) h_{t-1}:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
    dC_t = sum_d h_t dy_t       dB_t = sum_d g_t delta_t x_t       dA = sum_t g_t q_t delta_t
    dx_t = delta_t sum_n g_t B_t + D dy_t       ddelta_t = x_t sum_n g_t B_t + sum_n g_t q_t A

A program is one warp of 32 lanes with CH channels each (blocks of 32 channels) and walks over its tokens in reverse.
The states of a chunk are recomputed from the checkpoint that the forward saved every 16 tokens: the upper eight of 16
tokens need a first run over the lower eight. Inside a chunk a loop over the N states holds 8 tokens of CH channels at a
time. The sums over channels for dB, dC and d dt_low are folded across lanes (triton_math.fold). Sums over tokens are
accumulated in `partial`, one slice a program, and added up afterwards: no atomics, so gradients repeat bit for bit.

partial [K, B * segments, N + R + 2, D]: d A, d dt_proj weight (transposed), d dt_proj bias, d skip.
"""

# ruff: noqa: RUF005 (Triton joins tuples with +)

import triton
import triton.language as tl

from .triton_forward import load_rounded
from .triton_math import LN2, fold, high_float, low_float, softplus, softplus_slope

CHUNK = 8
T: tl.constexpr = tl.constexpr(CHUNK)


@triton.jit
def _load_tokens(p_x, p_table, in_d, CH: tl.constexpr, D: tl.constexpr):
    # Eight tokens of CH channel blocks, index t * CH + j; padding tokens are zeros.
    values = ()
    for t in tl.static_range(T):
        pixel = tl.load(p_table + t)
        for j in tl.static_range(CH):
            mask = in_d[j] & (pixel >= 0)
            values = values + (tl.load(p_x + pixel.to(tl.int64) * D + 32 * j, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _load_steps(
    p_dt, w, p_bias, in_d,
    CH: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    logits = ()
    for _ in tl.static_range(T):
        for j in tl.static_range(CH):
            logits = logits + (tl.load(p_bias + 32 * j, mask=in_d[j], other=0.0).to(tl.float32),)
    for r in range(R):
        summed = ()
        for t in tl.static_range(T):
            low = tl.load(p_dt + t * S + r)
            for j in tl.static_range(CH):
                b_w = load_rounded(w + 32 * j * R + r, in_d[j], DTYPE)
                summed = summed + (logits[t * CH + j] + b_w * low,)
        logits = summed
    steps = ()
    for i in tl.static_range(T * CH):
        steps = steps + (softplus(logits[i], NVIDIA),)
    return steps


@triton.jit
def _middle_states(
    xs, steps, p_bc, p_decay, p_from, p_to, in_d,
    CH: tl.constexpr, D: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # The states after eight tokens, from those before them.
    for n in range(N):
        b_t = ()
        for t in tl.static_range(T):
            b_t = b_t + (low_float(tl.load(p_bc + t * (S // 2) + n)),)
        for j in tl.static_range(CH):
            A = tl.load(p_decay + n * D + 32 * j, mask=in_d[j], other=0.0)
            h = tl.load(p_from + n * D + 32 * j, mask=in_d[j], other=0.0)
            for t in tl.static_range(T):
                delta = steps[t * CH + j]
                h = tl.exp2(delta * A) * h + (delta * xs[t * CH + j]) * b_t[t]
            tl.store(p_to + n * D + 32 * j, h, mask=in_d[j])


@triton.jit
def scan_backward_kernel(
    x, bc, dt_low, decay, dt_weight, dt_bias, skip, table, dy, states, carry, middle, dx, dproj, partial,
    B, HW, L, LP, NC, segments, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    CH: tl.constexpr, PER_GROUP: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment for 32 * CH channels of one group of one image.

    carry [K, B, segments, N, D] holds the gradient of the state after each segment and is overwritten; middle is
    scratch of the same shape. dproj [D / (32 CH), K, B, Lp, S] receives the sums over this program's channels.
    """
    pid = tl.program_id(0)
    NB: tl.constexpr = (D + 32 * CH - 1) // (32 * CH)
    block = pid % NB
    k = (pid // NB) % K
    segment = (pid // (NB * K)) % segments
    b = pid // (NB * K * segments)
    row = (k * B + b).to(tl.int64)
    slot = row * segments + segment
    lane = tl.arange(0, 32)
    i_d = block * 32 * CH + lane
    in_d = ()
    for j in tl.static_range(CH):
        in_d = in_d + (i_d + 32 * j < D,)

    p_x = x + b.to(tl.int64) * HW * D + i_d
    p_dy = dy + b.to(tl.int64) * HW * D + i_d
    p_dx = dx + b.to(tl.int64) * HW * D + i_d
    if PER_GROUP:
        p_dx += k.to(tl.int64) * B * HW * D
    p_decay = decay + k * N * D + i_d
    w = dt_weight + (k * D + i_d) * R
    p_bias = dt_bias + k * D + i_d
    p_skip = skip + k * D + i_d
    p_carry = carry + slot * N * D + i_d
    p_middle = middle + slot * N * D + i_d
    p_sum = partial + slot * (N + R + 2) * D + i_d
    p_dproj = dproj + (block.to(tl.int64) * K * B * LP + row * LP) * S

    d_skip = ()
    d_bias = ()
    for j in tl.static_range(CH):
        d_skip = d_skip + (tl.zeros([32], tl.float32),)
        d_bias = d_bias + (tl.zeros([32], tl.float32),)
        for i in range(N + R):
            tl.store(p_sum + i * D + 32 * j, tl.zeros([32], tl.float32), mask=in_d[j])

    first = segment * tokens // T
    count = (min((segment + 1) * tokens, L) + T - 1) // T - first
    for i in range(count):
        chunk = first + count - 1 - i
        t0 = chunk * T
        p_start = states + (row * NC + chunk // 2) * N * D + i_d
        if chunk % 2 == 1:
            lower = t0 - T
            xs = _load_tokens(p_x, table + k * LP + lower, in_d, CH, D)
            steps = _load_steps(dt_low + (row * LP + lower) * S + 2 * N, w, p_bias, in_d, CH, R, S, DTYPE, NVIDIA)
            p_bc = bc + (row * LP + lower) * (S // 2)
            _middle_states(xs, steps, p_bc, p_decay, p_start, p_middle, in_d, CH, D, N, S)
            p_start = p_middle
        p_bc = bc + (row * LP + t0) * (S // 2)
        p_dt = dt_low + (row * LP + t0) * S + 2 * N
        p_out = p_dproj + t0 * S
        xs = _load_tokens(p_x, table + k * LP + t0, in_d, CH, D)
        dys = _load_tokens(p_dy, table + k * LP + t0, in_d, CH, D)
        steps = _load_steps(p_dt, w, p_bias, in_d, CH, R, S, DTYPE, NVIDIA)
        gb = ()  # sum_n g B, index t * CH + j
        gqa = ()  # sum_n g q A log2(e)
        for _ in tl.static_range(T * CH):
            gb = gb + (tl.zeros([32], tl.float32),)
            gqa = gqa + (tl.zeros([32], tl.float32),)

        for n in range(N):
            b_t = ()
            c_t = ()
            for t in tl.static_range(T):
                pair = tl.load(p_bc + t * (S // 2) + n)
                b_t = b_t + (low_float(pair),)
                c_t = c_t + (high_float(pair),)
            d_b = ()
            d_c = ()
            gb_j = ()  # index j * T + t
            gqa_j = ()
            for j in tl.static_range(CH):
                A = tl.load(p_decay + n * D + 32 * j, mask=in_d[j], other=0.0)
                h = tl.load(p_start + n * D + 32 * j, mask=in_d[j], other=0.0)
                g = tl.load(p_carry + n * D + 32 * j, mask=in_d[j], other=0.0)
                d_a = tl.load(p_sum + n * D + 32 * j, mask=in_d[j], other=0.0)
                a_t = ()
                q_t = ()
                for t in tl.static_range(T):
                    delta = steps[t * CH + j]
                    a = tl.exp2(delta * A)
                    q = a * h
                    h = q + (delta * xs[t * CH + j]) * b_t[t]
                    a_t = a_t + (a,)
                    q_t = q_t + (q,)
                d_b_j = ()
                d_c_j = ()
                gb_t = ()
                gqa_t = ()
                for t in tl.static_range(T - 1, -1, -1):
                    du = steps[t * CH + j] * xs[t * CH + j]
                    g += c_t[t] * dys[t * CH + j]
                    gq = g * q_t[t]
                    gb_t = (gb[t * CH + j] + g * b_t[t],) + gb_t
                    gqa_t = (gqa[t * CH + j] + gq * A,) + gqa_t
                    d_a += gq * steps[t * CH + j]
                    g_du = g * du
                    h_dy = dys[t * CH + j] * (q_t[t] + du * b_t[t])
                    if j > 0:
                        g_du += d_b[t]
                        h_dy += d_c[t]
                    d_b_j = (g_du,) + d_b_j
                    d_c_j = (h_dy,) + d_c_j
                    g = a_t[t] * g
                d_b = d_b_j
                d_c = d_c_j
                gb_j = gb_j + gb_t
                gqa_j = gqa_j + gqa_t
                tl.store(p_carry + n * D + 32 * j, g, mask=in_d[j])
                tl.store(p_sum + n * D + 32 * j, d_a, mask=in_d[j])
            gb = ()
            gqa = ()
            for t in tl.static_range(T):
                for j in tl.static_range(CH):
                    gb = gb + (gb_j[j * T + t],)
                    gqa = gqa + (gqa_j[j * T + t],)
            # 16 vectors (dB of 8 tokens, dC of 8 tokens) into one: lane 2 i and 2 i + 1 hold halves of the i-th sum.
            folded = fold(fold(fold(fold(d_b + d_c, lane, 16), lane, 8), lane, 4), lane, 2)[0]
            folded += tl.gather(folded, lane ^ 1, 0)
            tl.store(p_out + ((lane >> 1) & 7) * S + 2 * n + (lane >> 4), folded, mask=(lane & 1) == 0)

        d_logit = ()  # gradient before the softplus, index t * CH + j
        for t in tl.static_range(T):
            pixel = tl.load(table + k * LP + t0 + t)
            for j in tl.static_range(CH):
                delta = steps[t * CH + j]
                b_skip = tl.load(p_skip + 32 * j, mask=in_d[j], other=0.0).to(tl.float32)
                d_x = delta * gb[t * CH + j] + b_skip * dys[t * CH + j]
                tl.store(p_dx + pixel.to(tl.int64) * D + 32 * j, d_x, mask=in_d[j] & (pixel >= 0))
                d_delta = gb[t * CH + j] * xs[t * CH + j] + gqa[t * CH + j] * LN2
                d_logit = d_logit + (d_delta * softplus_slope(delta),)
        d_skip_new = ()
        d_bias_new = ()
        for j in tl.static_range(CH):
            b_skip = d_skip[j]
            b_bias = d_bias[j]
            for t in tl.static_range(T):
                b_skip += dys[t * CH + j] * xs[t * CH + j]
                b_bias += d_logit[t * CH + j]
            d_skip_new = d_skip_new + (b_skip,)
            d_bias_new = d_bias_new + (b_bias,)
        d_skip = d_skip_new
        d_bias = d_bias_new
        for r in range(R):
            d_low = ()
            for j in tl.static_range(CH):
                b_w = load_rounded(w + 32 * j * R + r, in_d[j], DTYPE)
                d_w = tl.load(p_sum + (N + r) * D + 32 * j, mask=in_d[j], other=0.0)
                d_low_j = ()
                for t in tl.static_range(T):
                    d_w += d_logit[t * CH + j] * tl.load(p_dt + t * S + r)
                    value = d_logit[t * CH + j] * b_w
                    if j > 0:
                        value += d_low[t]
                    d_low_j = d_low_j + (value,)
                d_low = d_low_j
                tl.store(p_sum + (N + r) * D + 32 * j, d_w, mask=in_d[j])
            folded = fold(fold(fold(d_low, lane, 16), lane, 8), lane, 4)[0]
            folded += tl.gather(folded, lane ^ 2, 0)
            folded += tl.gather(folded, lane ^ 1, 0)
            tl.store(p_out + (lane >> 2) * S + 2 * N + r, folded, mask=(lane & 3) == 0)

    for j in tl.static_range(CH):
        tl.store(p_sum + (N + R) * D + 32 * j, d_bias[j], mask=in_d[j])
        tl.store(p_sum + (N + R + 1) * D + 32 * j, d_skip[j], mask=in_d[j])
