"""Forward scan kernels: sequential over tokens, one thread owns all N states of its channels.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t

A program is one warp of 32 lanes, one channel each, so that the sum over N needs no shuffle. All lanes need every B and
C of a token: those of four tokens come as one tile, a part of it in each lane, are under way while the four before are
worked on, and then go through shared memory once.
Long sequences are cut into segments: `segment_state_kernel` scans each from a zero state (the decay over a segment is
exp(A sum(delta))), `carry_kernel` turns end states into start states, and the scan kernel starts from those.
The same two kernels, with REVERSE, carry the gradient of the state from the last segment to the first.

Pointers: x, y [B, H*W, D]; proj (triton_project.py) [K, B, Lp, S], seen as int64 pairs `bc` and as floats `dt_low`;
decay = A * log2(e) [K, N, D]; states [K, B, ceil(L/T), N, D], the state before every T-th token; table [K, Lp].
"""

# ruff: noqa: RUF005 (Triton joins tuples with +)
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from .triton_math import GROUP, LANES, LOG2E, SIZES, T, high_float, load_rounded, low_float, softplus, unpack


@triton.jit
def decay_kernel(A_logs, decay, D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr):
    """decay[k, n, d] = -exp(A_logs[k * D + d, n]) * log2(e): exp(delta A) is then exp2(delta decay)."""
    k = tl.program_id(0)
    i_n = tl.arange(0, NP)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (i_n < N)[None, :] & (i_d < D)[:, None]
    b_a = tl.load(A_logs + (k * D + i_d)[:, None] * N + i_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(decay + (k * N + i_n)[None, :] * D + i_d[:, None], -tl.exp2(b_a * LOG2E) * LOG2E, mask=mask)


@triton.jit
def load_rank(w, in_d, R: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """R weights of each channel, for `group_steps`."""
    weights = ()
    if IN_REGISTERS:
        for r in tl.static_range(R):
            weights = weights + (load_rounded(w + r, in_d, DTYPE),)
    return weights


@triton.jit
def load_group(p_bc, p_table, p_values, in_d, D: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """GROUP tokens: their pairs (B, C) as one tile, a part of it in each lane, and the lanes' own numbers of a map."""
    i_n = tl.arange(0, triton.next_power_of_2(N))
    i_t = tl.arange(0, GROUP)
    b_bc = tl.load(p_bc + i_t[:, None] * (S // 2) + i_n[None, :], mask=(i_n < N)[None, :], other=0)
    pixels = load_pixels(p_table)
    values = ()
    for i in tl.static_range(GROUP):
        p_value = p_values + pixels[i].to(tl.int64) * D
        values = values + (tl.load(p_value, mask=in_d & (pixels[i] >= 0), other=0.0),)
    return b_bc, values


@triton.jit
def load_pixels(p_table):
    """The pixels of GROUP tokens, as scalars."""
    return unpack((tl.load(p_table + tl.arange(0, GROUP)),), GROUP)


@triton.jit
def unpack_pairs(b_bc, N: tl.constexpr):
    """The pairs of a tile [GROUP, N] as scalars: pair n of token t is number n GROUP + t.

    Tokens last: as lanes hold different ones, Triton hands the tile to all lanes (shared memory) before it splits it.
    """
    NUMBERS: tl.constexpr = triton.next_power_of_2(N) * GROUP
    return unpack((tl.reshape(tl.trans(b_bc), [NUMBERS]),), NUMBERS)


@triton.jit
def load_low(p_dt, S: tl.constexpr):
    """Four numbers of dt_low of each of GROUP tokens, as scalars: number r of token t is number 4 t + r."""
    tile = tl.load(p_dt + tl.arange(0, GROUP)[:, None] * S + tl.arange(0, 4)[None, :])
    return unpack((tl.reshape(tile, [GROUP * 4]),), GROUP * 4)


@triton.jit
def group_steps(
    bias, weights, w, p_dt, in_d,
    R: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The step sizes of GROUP tokens. dt_proj's weights of a small rank live in registers, of a large one in L1."""
    logits = ()
    for _ in tl.static_range(GROUP):
        logits = logits + (bias,)
    if IN_REGISTERS:
        for first in tl.static_range(0, R, 4):  # rows are filled up to fours: one load each
            low = load_low(p_dt + first, S)
            for r in tl.static_range(first, min(first + 4, R)):
                logits = _add_rank(logits, weights[r], low[r - first :: 4])
    else:
        for r in range(R):
            low = ()
            for i in tl.static_range(GROUP):
                low = low + (tl.load(p_dt + i * S + r),)
            logits = _add_rank(logits, load_rounded(w + r, in_d, DTYPE), low)
    steps = ()
    for i in tl.static_range(GROUP):
        steps = steps + (softplus(logits[i], NVIDIA),)
    return steps


@triton.jit
def _add_rank(logits, weight, low):
    out = ()
    for i in tl.static_range(GROUP):
        out = out + (logits[i] + weight * low[i],)
    return out


@triton.jit
def load_states(p, in_d, N: tl.constexpr, D: tl.constexpr):
    """N vectors of a block's channels, D apart."""
    values = ()
    for n in tl.static_range(N):
        values = values + (tl.load(p + n * D, mask=in_d, other=0.0),)
    return values


@triton.jit
def store_states(p, values, in_d, D: tl.constexpr):
    """The other way round."""
    for n in tl.static_range(len(values)):
        tl.store(p + n * D, values[n], mask=in_d)


@triton.jit
def zero_states(N: tl.constexpr):
    """N vectors of zeros."""
    values = ()
    for _ in tl.static_range(N):
        values = values + (tl.zeros([LANES], tl.float32),)
    return values


@triton.jit(do_not_specialize=(*SIZES, "LP"))
def scan_forward_kernel(
    x, bc, dt_low, decay, dt_weight, dt_bias, skip, table, starts, y, states,
    B, HW, L, LP, NC, segments, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SAVE: tl.constexpr, START: tl.constexpr, PER_GROUP: tl.constexpr,
    DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """y of one segment for 32 channels of one group of one image; with SAVE the state before every T-th token."""
    pid = tl.program_id(0)
    NB: tl.constexpr = (D + LANES - 1) // LANES
    k = (pid // NB) % K
    segment = (pid // (NB * K)) % segments
    b = pid // (NB * K * segments)
    row = (k * B + b).to(tl.int64)
    i_d = (pid % NB) * LANES + tl.arange(0, LANES)
    in_d = i_d < D

    A = load_states(decay + k * N * D + i_d, in_d, N, D)
    w = dt_weight + (k * D + i_d) * R
    weights = load_rank(w, in_d, R, DTYPE, IN_REGISTERS)
    bias = tl.load(dt_bias + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)
    skip_d = tl.load(skip + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)
    p_start = starts + (row * segments + segment) * N * D + i_d
    h = load_states(p_start, in_d, N, D) if START else zero_states(N)

    first = segment * tokens
    last = min(first + tokens, L)
    p_x = x + b.to(tl.int64) * HW * D + i_d
    p_y = y + b.to(tl.int64) * HW * D + i_d
    if PER_GROUP:
        p_y += k.to(tl.int64) * B * HW * D
    p_bc = bc + (row * LP + first) * (S // 2)
    p_dt = dt_low + (row * LP + first) * S + 2 * N
    p_table = table + tl.multiple_of(k * LP + first, T)
    p_state = states + (row * NC + first // T) * N * D + i_d

    # The next group's loads are under way while this one is computed. Tables and proj reach past the last group.
    b_bc, xs = load_group(p_bc, p_table, p_x, in_d, D, N, S)
    for checkpoint in range(first, last, T):
        if SAVE:
            store_states(p_state, h, in_d, D)
            p_state += N * D
        for _ in range(checkpoint, min(checkpoint + T, last), GROUP):
            steps = group_steps(bias, weights, w, p_dt, in_d, R, S, DTYPE, IN_REGISTERS, NVIDIA)
            pairs = unpack_pairs(b_bc, N)
            now_xs = xs
            pixels = load_pixels(p_table)  # again: to keep them costs more
            p_table += GROUP
            p_bc += GROUP * (S // 2)
            p_dt += GROUP * S
            b_bc, xs = load_group(p_bc, p_table, p_x, in_d, D, N, S)

            for i in tl.static_range(GROUP):
                now_x = now_xs[i].to(tl.float32)
                u = steps[i] * now_x
                out = skip_d * now_x
                new_h = ()
                for n in tl.static_range(N):
                    pair = pairs[n * GROUP + i]
                    h_n = tl.exp2(steps[i] * A[n]) * h[n] + u * low_float(pair)
                    out += h_n * high_float(pair)
                    new_h = new_h + (h_n,)
                h = new_h
                tl.store(p_y + pixels[i].to(tl.int64) * D, out, mask=in_d & (pixels[i] >= 0))


@triton.jit(do_not_specialize=(*SIZES, "LP"))
def segment_state_kernel(
    values, bc, dt_low, decay, dt_weight, dt_bias, table, ends, sums,
    B, HW, L, LP, segments, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    REVERSE: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """End state of one segment scanned from zero, and its sum of delta.

    values is x and the recurrence h = a h + delta x B; with REVERSE it is dy and g = a (g + C dy), last token first.
    The last segment's may run on over padding: nobody reads its end, nor in reverse its sum.
    """
    pid = tl.program_id(0)
    NB: tl.constexpr = (D + LANES - 1) // LANES
    k = (pid // NB) % K
    segment = (pid // (NB * K)) % segments
    b = pid // (NB * K * segments)
    row = (k * B + b).to(tl.int64)
    i_d = (pid % NB) * LANES + tl.arange(0, LANES)
    in_d = i_d < D
    A = load_states(decay + k * N * D + i_d, in_d, N, D)
    w = dt_weight + (k * D + i_d) * R
    weights = load_rank(w, in_d, R, DTYPE, IN_REGISTERS)
    bias = tl.load(dt_bias + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)

    first = segment * tokens
    groups = (min(tokens, L - first) + GROUP - 1) // GROUP
    start = first + ((groups - 1) * GROUP if REVERSE else 0)
    BY: tl.constexpr = -GROUP if REVERSE else GROUP
    p_v = values + b.to(tl.int64) * HW * D + i_d
    p_bc = bc + (row * LP + start) * (S // 2)
    p_dt = dt_low + (row * LP + start) * S + 2 * N
    p_table = table + tl.multiple_of(k * LP + start, GROUP)
    h = zero_states(N)
    total = tl.zeros([LANES], tl.float32)
    b_bc, vs = load_group(p_bc, p_table, p_v, in_d, D, N, S)
    for left in range(groups, 0, -1):
        steps = group_steps(bias, weights, w, p_dt, in_d, R, S, DTYPE, IN_REGISTERS, NVIDIA)
        pairs = unpack_pairs(b_bc, N)
        now_vs = vs
        if left > 1:
            p_table += BY
            p_bc += BY * (S // 2)
            p_dt += BY * S
        b_bc, vs = load_group(p_bc, p_table, p_v, in_d, D, N, S)

        for i in tl.static_range(GROUP - 1 if REVERSE else 0, -1 if REVERSE else GROUP, -1 if REVERSE else 1):
            now_v = now_vs[i].to(tl.float32)
            total += steps[i]
            u = steps[i] * now_v
            new_h = ()
            for n in tl.static_range(N):
                a = tl.exp2(steps[i] * A[n])
                pair = pairs[n * GROUP + i]
                h_n = a * (h[n] + now_v * high_float(pair)) if REVERSE else a * h[n] + u * low_float(pair)
                new_h = new_h + (h_n,)
            h = new_h
    store_states(ends + (row * segments + segment) * N * D + i_d, h, in_d, D)
    tl.store(sums + (row * segments + segment) * D + i_d, total, mask=in_d)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    ends, sums, decay, B, segments,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace each segment's end state (from zero) by the state it starts with; REVERSE starts at the last segment."""
    row = tl.program_id(0).to(tl.int64)
    k = row // B
    i = tl.program_id(1) * BD + tl.arange(0, BD)  # (n, d) flattened
    mask = i < N * D
    A = tl.load(decay + k * N * D + i, mask=mask, other=0.0)
    carry = tl.zeros([BD], tl.float32)
    for j in range(segments):
        segment = row * segments + (segments - 1 - j if REVERSE else j)
        end = tl.load(ends + segment * N * D + i, mask=mask, other=0.0)
        total = tl.load(sums + segment * D + i % D, mask=mask, other=0.0)
        tl.store(ends + segment * N * D + i, carry, mask=mask)
        carry = tl.exp2(A * total) * carry + end
