"""Backward scan kernel: from the last token to the first, sixteen at a time, with everything in registers.

With g_t the gradient of the state h_t and q_t = exp(delta_t A) h_{t-1}:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
    dC_t = sum_d h_t dy_t       dB_t = sum_d g_t delta_t x_t       dA = sum_t g_t q_t delta_t
    dx_t = delta_t sum_n g_t B_t + D dy_t       ddelta_t = x_t sum_n g_t B_t + sum_n g_t q_t A

A program is one warp of 32 lanes, one channel each, and walks over its tokens in reverse, sixteen at a time: the
distance of the states that the forward saved, from which those between are computed again. A loop over the N states
holds sixteen tokens of one state in registers; their B and C, a number in each lane, go through shared memory to all.
The sums over channels for dB, dC and d dt_low go across lanes, folded (triton_math.fold) or, with TENSOR, mostly on
tensor cores (triton_math.add_lanes); each program writes those of its 32 channels, and the GEMMs of triton_project.py
add them up as they read them. Sums over tokens are accumulated in `partial`, one slice a program, and added up
afterwards: no atomics, so gradients repeat bit for bit.

partial [K, B * segments, 3 N + R + 2, D]: the gradient of the state, the decay, d A, d dt_proj weight (transposed),
d dt_proj bias, d skip. The first two are there because a state's three numbers then have one address: each address more
costs the loop over the states, which is short of registers, four instructions.
"""

# ruff: noqa: RUF005 (Triton joins tuples with +)
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from .triton_forward import group_steps, load_low, load_pixels, load_rank
from .triton_math import (
    GROUP,
    LANES,
    LN2,
    SIZES,
    T,
    add_lanes,
    fold,
    lane_selectors,
    load_rounded,
    softplus_slope,
    swap,
    unpack,
)


@triton.jit
def _load_pixels(p_table):
    pixels = ()
    for t in tl.static_range(0, T, GROUP):
        pixels = pixels + load_pixels(p_table + t)
    return pixels


@triton.jit
def _load_tokens(p_x, pixels, in_d, D: tl.constexpr):
    # Tokens of one channel a lane; padding tokens are zeros.
    values = ()
    for t in tl.static_range(len(pixels)):
        p = p_x + pixels[t].to(tl.int64) * D
        values = values + (tl.load(p, mask=in_d & (pixels[t] >= 0), other=0.0).to(tl.float32),)
    return values


@triton.jit
def _fold_sums(sums, lane, TENSOR: tl.constexpr):
    # What a state leaves of dB and dC, into one number a lane.
    if TENSOR:
        folded = fold(fold(fold(sums, lane, 16), lane, 8), lane, 4)
    else:
        folded = sums
        for bit in tl.static_range(4):
            folded = fold(folded[:2], lane, 8 >> bit) + folded[2:]
    return folded[0]


@triton.jit
def _place_of_folded(lane, SG: tl.constexpr, TENSOR: tl.constexpr):
    # Which sum a lane has then, as its place in dproj.
    if TENSOR:
        # Bit 16 of the lane became the half of the tokens, bit 8 B or C, bit 4 the token's parity.
        token = (lane >> 4) * 8 + (lane & 3) * 2 + ((lane >> 2) & 1)
        is_c = (lane >> 3) & 1
    else:
        # Bit 16 became B or C, the others the token, its lowest bit first.
        token = ((lane >> 3) & 1) + ((lane >> 1) & 2) + ((lane << 1) & 4) + ((lane << 3) & 8)
        is_c = lane >> 4
    return token * SG + is_c


@triton.jit
def _rank_gradients(
    w, p_sum, p_out, low, d_logit, in_d, lane, selectors, SG: tl.constexpr, DTYPE: tl.constexpr, TENSOR: tl.constexpr
):
    # Of one column of dt_proj's weight, and of dt_low, of which `low` has T tokens.
    b_w = load_rounded(w, in_d, DTYPE)
    d_w = tl.load(p_sum, mask=in_d, other=0.0)
    d_low = ()
    for t in tl.static_range(T):
        d_w += d_logit[t] * low[t]
        d_low = d_low + (d_logit[t] * b_w,)
    tl.store(p_sum, d_w, mask=in_d)
    if TENSOR:
        zero = tl.zeros([LANES], tl.float32)
        sums = (zero, zero, zero, zero)
        for t in tl.static_range(0, 8, 2):
            even, odd = (d_low[t], d_low[t + 8]), (d_low[t + 1], d_low[t + 9])
            sums = add_lanes(even, odd, selectors[t], selectors[t + 1], sums)
        folded = fold(fold(sums, lane, 16), lane, 8)[0]
        folded += swap(folded, 4)
        token = (lane >> 4) * 8 + (lane & 3) * 2 + ((lane >> 3) & 1)
        tl.store(p_out + token * SG, folded, mask=(lane & 4) == 0)
    else:
        folded = fold(fold(fold(fold(d_low, lane, 16), lane, 8), lane, 4), lane, 2)[0]
        folded += swap(folded, 1)
        tl.store(p_out + (lane >> 1) * SG, folded, mask=(lane & 1) == 0)


@triton.jit(do_not_specialize=(*SIZES, "LP"))
def scan_backward_kernel(
    x, dt_low, decay, dt_weight, dt_bias, skip, table, dy, states, carry, dx, dproj, partial,
    B, HW, L, LP, NC, segments, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SG: tl.constexpr,
    PER_GROUP: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr,
    NVIDIA: tl.constexpr, TENSOR: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment for 32 channels of one group of one image.

    carry [K, B, segments, N, D] holds the gradient of the state after each segment.
    dproj [D / LANES, K, B, Lp, SG] receives the sums over this program's channels.
    """
    pid = tl.program_id(0)
    NB: tl.constexpr = (D + LANES - 1) // LANES
    block = pid % NB
    k = (pid // NB) % K
    segment = (pid // (NB * K)) % segments
    b = pid // (NB * K * segments)
    row = (k * B + b).to(tl.int64)
    slot = row * segments + segment
    lane = tl.arange(0, LANES)
    i_d = block * LANES + lane
    in_d = i_d < D

    p_x = x + b.to(tl.int64) * HW * D + i_d
    p_dy = dy + b.to(tl.int64) * HW * D + i_d
    p_dx = dx + b.to(tl.int64) * HW * D + i_d
    if PER_GROUP:
        p_dx += k.to(tl.int64) * B * HW * D
    p_decay = decay + k * N * D + i_d
    w = dt_weight + (k * D + i_d) * R
    bias = tl.load(dt_bias + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)
    skip_d = tl.load(skip + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)
    p_carry = carry + slot * N * D + i_d
    p_g = partial + slot * (3 * N + R + 2) * D + i_d
    p_a = p_g + N * D
    p_sum = p_a + N * D
    p_dproj = dproj + (block.to(tl.int64) * K * B * LP + row * LP) * SG
    zero = tl.zeros([LANES], tl.float32)
    zeros = (zero, zero, zero, zero)
    selectors = lane_selectors(lane) if TENSOR else ()
    d_skip = tl.zeros([LANES], tl.float32)
    d_bias = tl.zeros([LANES], tl.float32)
    for n in range(N):
        tl.store(p_g + n * D, tl.load(p_carry + n * D, mask=in_d, other=0.0), mask=in_d)
        tl.store(p_a + n * D, tl.load(p_decay + n * D, mask=in_d, other=0.0), mask=in_d)
    for i in range(N + R):
        tl.store(p_sum + i * D, tl.zeros([LANES], tl.float32), mask=in_d)

    first = segment * tokens // T
    count = (min((segment + 1) * tokens, L) + T - 1) // T - first
    for i in range(count):
        chunk = first + count - 1 - i
        p_table = table + tl.multiple_of(k * LP + chunk * T, T)
        p_state = states + (row * NC + chunk) * N * D + i_d
        p_bc = dt_low + (row * LP + chunk * T + (lane & 15)) * S + (lane >> 4)
        p_dt = dt_low + (row * LP + chunk * T) * S + 2 * N
        p_out = p_dproj + chunk * T * SG
        xs, dys = (), ()
        for t in tl.static_range(0, T, GROUP):
            pixels = load_pixels(p_table + t)
            xs = xs + _load_tokens(p_x, pixels, in_d, D)
            dys = dys + _load_tokens(p_dy, pixels, in_d, D)
        weights = load_rank(w, in_d, R, DTYPE, IN_REGISTERS)
        steps = ()
        for t in tl.static_range(0, T, GROUP):
            steps = steps + group_steps(bias, weights, w, p_dt + t * S, in_d, R, S, DTYPE, IN_REGISTERS, NVIDIA)
        us = ()  # delta x
        gb = ()  # sum_n g B
        gqa = ()  # sum_n g q A log2(e)
        for t in tl.static_range(T):
            us = us + (steps[t] * xs[t],)
            gb = gb + (tl.zeros([LANES], tl.float32),)
            gqa = gqa + (tl.zeros([LANES], tl.float32),)
            d_skip += dys[t] * xs[t]

        # The next state, and the B and C of its tokens (one number a lane), are under way while this one is worked on.
        next_h = tl.load(p_state, mask=in_d, other=0.0)
        next_bc = tl.load(p_bc)
        sums = zeros + (zeros if TENSOR else (zero,))
        p_folded = p_out + _place_of_folded(lane, SG, TENSOR)
        for n in range(N):
            A = tl.load(p_a + n * D, mask=in_d, other=0.0)
            h = next_h
            bc_n = unpack((next_bc,), 2 * T)  # B of the tokens, then C
            next_h = tl.load(p_state + (n + 1) * D, mask=in_d & (n + 1 < N), other=0.0)
            next_bc = tl.load(p_bc + 2 * n + 2)
            g = tl.load(p_g + n * D, mask=in_d, other=0.0)
            d_a = tl.load(p_sum + n * D, mask=in_d, other=0.0)
            a_t = ()
            h_t = (h,)
            for t in tl.static_range(T):
                a = tl.exp2(steps[t] * A)
                h = a * h + us[t] * bc_n[t]
                a_t = a_t + (a,)
                h_t = h_t + (h,)
            # Folds of the state before: to keep its sums for so long costs less than to wait for shuffle after shuffle.
            tl.store(p_folded + 2 * (n - 1), _fold_sums(sums, lane, TENSOR), mask=n > 0)
            d_bc = ()
            low = zeros  # sums of tokens 0 to 7
            high = zeros  # and of 8 to 15
            odd = (zero, zero)
            gb_new = ()
            gqa_new = ()
            for t in tl.static_range(T - 1, -1, -1):
                g += bc_n[T + t] * dys[t]
                ga = g * a_t[t]
                gq = ga * h_t[t]
                d_a += gq * steps[t]
                gb_new = (gb[t] + g * bc_n[t],) + gb_new
                gqa_new = (gqa[t] + gq * A,) + gqa_new
                d_b = g * us[t]
                d_c = dys[t] * h_t[t + 1]
                if not TENSOR:
                    # Five folds as early as their operands are there. The first sums dB in lanes 0-15, dC in 16-31.
                    d_bc = fold((d_b, d_c), lane, 16) + d_bc
                    for bit in tl.static_range(4):
                        if t > 0 and t % (2 << bit) == 0:
                            d_bc = fold(d_bc[:2], lane, 8 >> bit) + d_bc[2:]
                elif t % 2 == 1:
                    odd = (d_b, d_c)
                elif t < 8:
                    low = add_lanes((d_b, d_c), odd, selectors[t], selectors[t + 1], low)
                else:
                    high = add_lanes((d_b, d_c), odd, selectors[t - 8], selectors[t - 7], high)
                g = ga
            gb = gb_new
            gqa = gqa_new
            tl.store(p_g + n * D, g, mask=in_d)
            tl.store(p_sum + n * D, d_a, mask=in_d)
            sums = low + high if TENSOR else d_bc
        tl.store(p_folded + 2 * (N - 1), _fold_sums(sums, lane, TENSOR))

        d_logit = ()  # gradient before the softplus
        pixels = _load_pixels(p_table)
        for t in tl.static_range(T):
            d_x = steps[t] * gb[t] + skip_d * dys[t]
            tl.store(p_dx + pixels[t].to(tl.int64) * D, d_x, mask=in_d & (pixels[t] >= 0))
            d_t = (gb[t] * xs[t] + gqa[t] * LN2) * softplus_slope(steps[t])
            d_logit = d_logit + (d_t,)
            d_bias += d_t
        if IN_REGISTERS:
            for r_0 in tl.static_range(0, R, 4):
                rows = ()
                for t in tl.static_range(0, T, GROUP):
                    rows = rows + load_low(p_dt + t * S + r_0, S)
                for r in tl.static_range(r_0, min(r_0 + 4, R)):
                    _rank_gradients(
                        w + r, p_sum + (N + r) * D, p_out + 2 * N + r, rows[r - r_0 :: 4], d_logit,
                        in_d, lane, selectors, SG, DTYPE, TENSOR,
                    )  # fmt: skip
        else:
            for r in range(R):
                rows = ()
                for t in tl.static_range(T):
                    rows = rows + (tl.load(p_dt + t * S + r),)
                _rank_gradients(
                    w + r, p_sum + (N + r) * D, p_out + 2 * N + r, rows, d_logit,
                    in_d, lane, selectors, SG, DTYPE, TENSOR,
                )  # fmt: skip

    tl.store(p_sum + (N + R) * D, d_bias, mask=in_d)
    tl.store(p_sum + (N + R + 1) * D, d_skip, mask=in_d)
