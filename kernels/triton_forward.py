"""Forward scan kernels: sequential over tokens, one thread owns all N states of its channels.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t

Tiles are [N, BD] with the channels BD across the lanes of one warp, so that the sum over N needs no shuffle.
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

from .triton_math import LOG2E, SIZES, T, high_float, load_rounded, low_float, prefetch, softplus


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
def load_low(dt_low, R: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """The R numbers that dt_proj turns into one token's step sizes; none if the rank is too large to keep them."""
    low = ()
    if IN_REGISTERS:
        for r in tl.static_range(R):
            low = low + (tl.load(dt_low + r),)
    return low


@triton.jit
def step_logits(
    bias, weights, low, w, dt_low, in_d, R: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr
):  # fmt: skip
    """bias + dt_proj row . dt_low of one token. The weights of a small rank live in registers, of a large one in L1."""
    v = bias
    if IN_REGISTERS:
        for r in tl.static_range(R):
            v += weights[r] * low[r]
    else:
        for r in range(R):
            v += load_rounded(w + r, in_d, DTYPE) * tl.load(dt_low + r)
    return v


@triton.jit
def load_rank(w, in_d, R: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """R weights of each channel, for `step_logits`."""
    weights = ()
    if IN_REGISTERS:
        for r in tl.static_range(R):
            weights = weights + (load_rounded(w + r, in_d, DTYPE),)
    return weights


# Alignment of these pointers would make Triton spread the states of a channel over lanes (a fifth slower by its SASS).
@triton.jit(do_not_specialize=(*SIZES, "LP"), do_not_specialize_on_alignment=["decay", "states", "starts"])
def scan_forward_kernel(
    x, bc, dt_low, decay, dt_weight, dt_bias, skip, table, starts, y, states,
    B, HW, L, LP, NC, segments, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BD: tl.constexpr, SAVE: tl.constexpr, START: tl.constexpr, PER_GROUP: tl.constexpr,
    DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """y of one segment for BD channels of one group of one image; with SAVE the state before every T-th token."""
    pid = tl.program_id(0)
    NB: tl.constexpr = (D + BD - 1) // BD
    k = (pid // NB) % K
    segment = (pid // (NB * K)) % segments
    b = pid // (NB * K * segments)
    row = (k * B + b).to(tl.int64)
    i_d = (pid % NB) * BD + tl.arange(0, BD)
    i_n = tl.arange(0, NP)
    in_d = i_d < D
    in_nd = (i_n < N)[:, None] & in_d[None, :]

    A = tl.load(decay + (k * N + i_n)[:, None] * D + i_d[None, :], mask=in_nd, other=0.0)
    w = dt_weight + (k * D + i_d) * R
    weights = load_rank(w, in_d, R, DTYPE, IN_REGISTERS)
    bias = tl.load(dt_bias + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)
    skip_d = tl.load(skip + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)
    if START:
        h = tl.load(starts + ((row * segments + segment) * N + i_n)[:, None] * D + i_d[None, :], mask=in_nd, other=0.0)
    else:
        h = tl.zeros([NP, BD], tl.float32)

    first = segment * tokens
    last = min(first + tokens, L)
    p_x = x + b.to(tl.int64) * HW * D + i_d
    p_y = y + b.to(tl.int64) * HW * D + i_d
    if PER_GROUP:
        p_y += k.to(tl.int64) * B * HW * D
    p_bc = bc + (row * LP + first) * (S // 2) + i_n
    p_dt = dt_low + (row * LP + first) * S + 2 * N
    p_table = table + k * LP + first
    p_state = states + ((row * NC + first // T) * N + i_n)[:, None] * D + i_d[None, :]

    # The next token's loads are under way while this one is computed. Tables and proj reach past the last token.
    pixel = tl.load(p_table)
    next_pixel = tl.load(p_table + 1)
    b_x = tl.load(p_x + pixel.to(tl.int64) * D, mask=in_d & (pixel >= 0), other=0.0)
    b_bc = tl.load(p_bc, mask=i_n < N, other=0)
    low = load_low(p_dt, R, IN_REGISTERS)
    for checkpoint in range(first, last, T):
        if NVIDIA:  # one token ahead hides L2's latency, not that of the memory behind it
            ahead = min(checkpoint + T, LP - T)
            x_block = x + b.to(tl.int64) * HW * D + (pid % NB) * BD
            _prefetch_tokens(x_block, dt_low + (row * LP + ahead) * S, table + k * LP + ahead, D, S, BD, NVIDIA)
        if SAVE:
            tl.store(p_state, h, mask=in_nd)
            p_state += N * D
        for _ in range(checkpoint, min(checkpoint + T, last)):
            now_pixel, now_x, now_bc = pixel, b_x.to(tl.float32), b_bc
            v = step_logits(bias, weights, low, w, p_dt, in_d, R, DTYPE, IN_REGISTERS)
            p_table += 1
            p_bc += S // 2
            p_dt += S
            pixel = next_pixel
            next_pixel = tl.load(p_table + 1)
            b_x = tl.load(p_x + pixel.to(tl.int64) * D, mask=in_d & (pixel >= 0), other=0.0)
            b_bc = tl.load(p_bc, mask=i_n < N, other=0)
            low = load_low(p_dt, R, IN_REGISTERS)

            delta = softplus(v, NVIDIA)
            h = tl.exp2(delta[None, :] * A) * h + (delta * now_x)[None, :] * low_float(now_bc)[:, None]
            out = tl.sum(h * high_float(now_bc)[:, None], 0) + skip_d * now_x
            tl.store(p_y + now_pixel.to(tl.int64) * D, out, mask=in_d & (now_pixel >= 0))


@triton.jit
def _prefetch_tokens(
    x, dt_low, p_table, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, NVIDIA: tl.constexpr
):  # fmt: skip
    # T tokens of x (two 32-byte sectors of a half type's 32 channels) and their rows of proj. Where the last block has
    # fewer channels, a second sector could lie past the map.
    SECOND: tl.constexpr = BD // 2 if D % BD == 0 else 0
    i = tl.arange(0, 2 * T)
    pixel = tl.maximum(tl.load(p_table + i // 2), 0)
    prefetch(x + pixel.to(tl.int64) * D + (i % 2) * SECOND, NVIDIA)
    SECTORS: tl.constexpr = triton.next_power_of_2(T * S // 8)
    prefetch(dt_low + tl.minimum(8 * tl.arange(0, SECTORS), T * S - 1), NVIDIA)


@triton.jit(do_not_specialize=(*SIZES, "LP"), do_not_specialize_on_alignment=["decay", "ends"])
def segment_state_kernel(
    values, bc, dt_low, decay, dt_weight, dt_bias, table, ends, sums,
    B, HW, L, LP, segments, tokens,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    BD: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, IN_REGISTERS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """End state of one segment scanned from zero, and its sum of delta.

    values is x and the recurrence h = a h + delta x B; with REVERSE it is dy and g = a (g + C dy), last token first.
    """
    pid = tl.program_id(0)
    NB: tl.constexpr = (D + BD - 1) // BD
    k = (pid // NB) % K
    segment = (pid // (NB * K)) % segments
    b = pid // (NB * K * segments)
    row = (k * B + b).to(tl.int64)
    i_d = (pid % NB) * BD + tl.arange(0, BD)
    i_n = tl.arange(0, NP)
    in_d = i_d < D
    in_nd = (i_n < N)[:, None] & in_d[None, :]
    A = tl.load(decay + (k * N + i_n)[:, None] * D + i_d[None, :], mask=in_nd, other=0.0)
    w = dt_weight + (k * D + i_d) * R
    weights = load_rank(w, in_d, R, DTYPE, IN_REGISTERS)
    bias = tl.load(dt_bias + k * D + i_d, mask=in_d, other=0.0).to(tl.float32)

    first = segment * tokens
    count = min(first + tokens, L) - first
    p_v = values + b.to(tl.int64) * HW * D + i_d
    h = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    t = first + (count - 1 if REVERSE else 0)
    pixel = tl.load(table + k * LP + t)
    b_v = tl.load(p_v + pixel.to(tl.int64) * D, mask=in_d & (pixel >= 0), other=0.0)
    b_bc = tl.load(bc + (row * LP + t) * (S // 2) + i_n, mask=i_n < N, other=0)
    p_dt = dt_low + (row * LP + t) * S + 2 * N
    low = load_low(p_dt, R, IN_REGISTERS)
    for _ in range(count):
        now_v, now_bc = b_v.to(tl.float32), b_bc
        delta = softplus(step_logits(bias, weights, low, w, p_dt, in_d, R, DTYPE, IN_REGISTERS), NVIDIA)
        t = tl.maximum(t - 1, 0) if REVERSE else t + 1
        pixel = tl.load(table + k * LP + t)
        b_v = tl.load(p_v + pixel.to(tl.int64) * D, mask=in_d & (pixel >= 0), other=0.0)
        b_bc = tl.load(bc + (row * LP + t) * (S // 2) + i_n, mask=i_n < N, other=0)
        p_dt = dt_low + (row * LP + t) * S + 2 * N
        low = load_low(p_dt, R, IN_REGISTERS)

        total += delta
        a = tl.exp2(delta[None, :] * A)
        if REVERSE:
            h = a * (h + now_v[None, :] * high_float(now_bc)[:, None])
        else:
            h = a * h + (delta * now_v)[None, :] * low_float(now_bc)[:, None]
    tl.store(ends + ((row * segments + segment) * N + i_n)[:, None] * D + i_d[None, :], h, mask=in_nd)
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
