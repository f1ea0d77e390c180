"""The recurrence of `selective_scan.py` in Triton: `[batch, channels, L]` as Mamba has it, tokens side by side.

A program walks a sequence in tiles of all states and T tokens; within a tile the recurrence is a parallel scan of pairs
(decay, input). The backward goes from the last tile to the first: it scans the states again from those that the forward
saved before every tile, and their gradients in reverse. A program of it takes several channels of a group, so that it
sums their gradients of B and C in registers; what several programs of a group have is added by PyTorch, in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import LOG2E, on_device

TILE = 1024  # states times tokens
CHANNELS = 16  # of a program of the backward
BACKWARD_WARPS = 8  # with four its tiles take 246 registers a thread, with eight half of that
# Sizes and strides that change from batch to batch; see `triton_math.SIZES`. That of a token stays: it is 1 or 0.
VARYING = ("L", "channels", "G", "programs", "B_batch", "B_group", "B_n", "C_batch", "C_group", "C_n")


def _tile(N: int) -> tuple[int, int]:
    """States, filled up to a power of two, and tokens of a tile."""
    NP = triton.next_power_of_2(N)
    return NP, min(128, max(8, TILE // NP))


def states_shape(batch: int, channels: int, L: int, N: int, G: int) -> tuple[int, ...]:
    """Shape of the states that the forward saves: one before every tile."""
    return batch, channels, triton.cdiv(L, _tile(N)[1]), N


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, last_state, states)`; without `save` the states are empty."""
    batch, channels, L = u.shape
    G, N = B.shape[1:3]
    NP, T = _tile(N)
    u, delta, A = u.contiguous(), delta.contiguous(), A.contiguous()
    y, last_state = torch.empty_like(u), u.new_empty(batch, channels, N)
    states = u.new_empty(states_shape(batch, channels, L, N, G) if save else (0,))
    with on_device(u.device):
        forward_kernel[(batch * channels,)](
            u, delta, A, B, C, y, last_state, states,
            L, channels, G, *B.stride(), *C.stride(), N=N, NP=NP, T=T, SAVE=save,
        )  # fmt: skip
    return y, last_state, states


def backward(
    dy: Tensor, d_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C from those of y and of the last state, and the saved states."""
    batch, channels, L = u.shape
    G, N = B.shape[1:3]
    NP, T = _tile(N)
    programs = triton.cdiv(channels // G, CHANNELS)  # of a group
    u, delta, A, dy = (t.contiguous() for t in (u, delta, A, dy))
    du, d_delta = torch.empty_like(u), torch.empty_like(delta)
    carry = d_last.clone(memory_format=torch.contiguous_format)  # gradient of the state before the tile that comes next
    dA = u.new_zeros(batch, channels, N)
    dB, dC = (u.new_empty(batch, G, programs, N, L) for _ in range(2))
    with on_device(u.device):
        backward_kernel[(batch * G * programs,)](
            u, delta, A, B, C, dy, states, carry, du, d_delta, dA, dB, dC,
            L, channels, G, programs, *B.stride(), *C.stride(),
            N=N, NP=NP, T=T, CHANNELS=CHANNELS, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    return du, d_delta, dA.sum(0), dB.sum(2), dC.sum(2)


@triton.jit
def combine(first_decay, first_state, decay, state):
    """One step of the recurrence after another, as one."""
    return first_decay * decay, first_state * decay + state


@triton.jit(do_not_specialize=[name for name in VARYING if name != "programs"])
def forward_kernel(
    u, delta, A, Bt, Ct, y, last_state, states, L, channels, G, B_batch, B_group, B_n, B_t, C_batch, C_group, C_n, C_t,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, channel = row // channels, row % channels
    group = channel // (channels // G)
    n = tl.arange(0, NP)
    is_state = n < N
    p_B = Bt + batch * B_batch + group * B_group + n[:, None] * B_n
    p_C = Ct + batch * C_batch + group * C_group + n[:, None] * C_n
    b_A = tl.load(A + channel * N + n, mask=is_state, other=0.0) * LOG2E  # [NP]
    b_h = tl.zeros([NP], dtype=tl.float32)
    tiles = tl.cdiv(L, T)
    for tile in range(0, tiles):
        if SAVE:
            tl.store(states + (row * tiles + tile) * N + n, b_h, mask=is_state)
        t = tile * T + tl.arange(0, T)
        inside = t < L
        used = is_state[:, None] & inside[None, :]
        # Tokens after the last have delta 0: they leave the state as it is.
        b_delta = tl.load(delta + row * L + t, mask=inside, other=0.0)  # [T]
        b_u = tl.load(u + row * L + t, mask=inside, other=0.0)
        b_B = tl.load(p_B + t[None, :] * B_t, mask=used, other=0.0)  # [NP, T]
        b_C = tl.load(p_C + t[None, :] * C_t, mask=used, other=0.0)
        b_decay = tl.exp2(b_A[:, None] * b_delta[None, :])
        b_input = b_B * (b_delta * b_u)[None, :]
        b_input = tl.where((t == tile * T)[None, :], b_input + b_decay * b_h[:, None], b_input)
        _, b_states = tl.associative_scan((b_decay, b_input), 1, combine)
        tl.store(y + row * L + t, tl.sum(b_states * b_C, 0), mask=inside)
        b_h = tl.sum(tl.where((t == tile * T + T - 1)[None, :], b_states, 0.0), 1)
    tl.store(last_state + row * N + n, b_h, mask=is_state)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    u, delta, A, Bt, Ct, dy, states, carry, du, d_delta, dA, dB, dC, L, channels, G, programs,
    B_batch, B_group, B_n, B_t, C_batch, C_group, C_n, C_t,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)  # of batch, group and programs of a group
    batch, group, block = part // (G * programs), part // programs % G, part % programs
    width = channels // G
    n = tl.arange(0, NP)
    is_state = n < N
    p_B = Bt + batch * B_batch + group * B_group + n[:, None] * B_n
    p_C = Ct + batch * C_batch + group * C_group + n[:, None] * C_n
    first = group * width + block * CHANNELS
    count = tl.minimum(CHANNELS, width - block * CHANNELS)
    tiles = tl.cdiv(L, T)
    for back in range(0, tiles):
        tile = tiles - 1 - back
        t = tile * T + tl.arange(0, T)
        inside = t < L
        is_first, is_last = (t == tile * T)[None, :], (t == tile * T + T - 1)[None, :]
        before, after = inside & (t > tile * T), t + 1 < L
        used = is_state[:, None] & inside[None, :]
        b_B = tl.load(p_B + t[None, :] * B_t, mask=used, other=0.0)  # [NP, T]
        b_C = tl.load(p_C + t[None, :] * C_t, mask=used, other=0.0)
        b_B_before = tl.load(p_B + (t - 1)[None, :] * B_t, mask=is_state[:, None] & before[None, :], other=0.0)
        b_dB = tl.zeros([NP, T], dtype=tl.float32)
        b_dC = tl.zeros([NP, T], dtype=tl.float32)
        for i in range(0, count):
            row = batch * channels + first + i
            b_A = tl.load(A + (first + i) * N + n, mask=is_state, other=0.0)  # [NP]
            b_carry = tl.load(carry + row * N + n, mask=is_state, other=0.0)
            b_dA = tl.load(dA + row * N + n, mask=is_state, other=0.0)
            b_start = tl.load(states + (row * tiles + tile) * N + n, mask=is_state, other=0.0)
            b_delta = tl.load(delta + row * L + t, mask=inside, other=0.0)  # [T]
            b_delta_before = tl.load(delta + row * L + t - 1, mask=before, other=0.0)
            b_delta_after = tl.load(delta + row * L + t + 1, mask=after, other=0.0)
            b_u = tl.load(u + row * L + t, mask=inside, other=0.0)
            b_u_before = tl.load(u + row * L + t - 1, mask=before, other=0.0)
            b_dy = tl.load(dy + row * L + t, mask=inside, other=0.0)
            b_bits = (b_A * LOG2E)[:, None]

            # The states before each token: the scan of the tokens before, from the saved one.
            b_input = b_B_before * (b_delta_before * b_u_before)[None, :]
            b_input = tl.where(is_first, b_start[:, None], b_input)
            _, b_before = tl.associative_scan((tl.exp2(b_bits * b_delta_before[None, :]), b_input), 1, combine)
            b_decay = tl.exp2(b_bits * b_delta[None, :])
            b_kept = b_decay * b_before
            b_product = (b_delta * b_u)[None, :]

            # Their gradients g_t = C_t dy_t + decay_{t+1} g_{t+1}.
            b_g = b_C * b_dy[None, :]
            b_g = tl.where(is_last, b_g + b_carry[:, None], b_g)
            b_decay_after = tl.exp2(b_bits * b_delta_after[None, :])
            _, b_g = tl.associative_scan((b_decay_after, b_g), 1, combine, reverse=True)

            b_dC += (b_kept + b_B * b_product) * b_dy[None, :]
            b_dB += b_g * b_product
            b_d_product = tl.sum(b_g * b_B, 0)
            b_d_exponent = b_g * b_kept
            tl.store(du + row * L + t, b_d_product * b_delta, mask=inside)
            b_d_delta = b_d_product * b_u + tl.sum(b_d_exponent * b_A[:, None], 0)
            tl.store(d_delta + row * L + t, b_d_delta, mask=inside)
            b_dA += tl.sum(b_d_exponent * b_delta[None, :], 1)
            tl.debug_barrier()  # all have read what is written here
            tl.store(dA + row * N + n, b_dA, mask=is_state)
            tl.store(carry + row * N + n, tl.sum(tl.where(is_first, b_decay * b_g, 0.0), 1), mask=is_state)
        tl.debug_barrier()  # and read in the next tile
        p_out = (part * N + n[:, None]) * L + t[None, :]
        tl.store(dB + p_out, b_dB, mask=used)
        tl.store(dC + p_out, b_dC, mask=used)
