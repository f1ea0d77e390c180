"""The compiled CPU forward: input projections in scan order, and the scan (arXiv 2403.09977, eq. 2-5; reference.py).

A kernel is a function `(call, task, zero)`: sizes and addresses are in the record `call` (numba_launch.py), which part
of the work it does is the task's number, and the type it computes in is that of `zero`. No task reads what another task
of the same kernel writes, and what a task is does not depend on the number of threads.
"""

import numpy as np
from numba import njit

from .chunked import CHUNK
from .numba_vector import COMPILED, LANES, LN2, array_at, exp2, load, softplus, splat, store

TILE = 4  # tokens that are projected together


@njit(**COMPILED)
def arrange_kernel(call, task, zero):
    """16 channels of a group: parameters in the layout of the other kernels, zeros for channels that x lacks.

    `x_proj` is B [Np], C [Np] and dt_low [Rp] of every channel, `A` the exponent of a decay to base 2.
    """
    blocks, N, R, S, D = call.D // LANES, call.N, call.R, call.S, call.channels
    k, first = task // blocks, task % blocks * LANES
    x_proj_weight = array_at(call.x_proj_weight, (call.K, R + 2 * N, D), zero)
    dt_weight = array_at(call.dt_weight, (call.K, D, R), zero)
    minus_A = array_at(call.minus_A, (call.K, D, N), zero)
    x_proj = array_at(call.x_proj, (call.K, call.D, S), zero)
    dt_proj = array_at(call.dt_proj, (call.K, R, call.D), zero)
    A = array_at(call.A, (call.K, N, call.D), zero)
    for d in range(first, first + LANES):
        for s in range(S):
            x_proj[k, d, s] = 0
        for n in range(N):
            A[k, n, d] = minus_A[k, d, n] / type(zero)(-LN2) if d < D else 0
        for r in range(R):
            dt_proj[k, r, d] = dt_weight[k, d, r] if d < D else 0
    for r in range(R):
        for d in range(first, min(first + LANES, D)):
            x_proj[k, d, 2 * call.Np + r] = x_proj_weight[k, r, d]
    for n in range(N):
        for d in range(first, min(first + LANES, D)):
            x_proj[k, d, n] = x_proj_weight[k, R + n, d]
            x_proj[k, d, call.Np + n] = x_proj_weight[k, R + N + n, d]


@njit(**COMPILED)
def project_kernel(call, task, zero):
    """Four tokens of a group: `proj[k, b, t] = x_proj[k] x[b, paths[k, t]]`, zeros at padding tokens."""
    tiles = call.Lp // TILE
    k, b, t = task // (tiles * call.B), task // tiles % call.B, task % tiles * TILE
    x = array_at(call.x, (call.B, call.HW, call.D), zero)
    weight = array_at(call.x_proj, (call.K, call.D, call.S), zero)
    proj = array_at(call.proj, (call.K, call.B, call.Lp, call.S), zero)
    paths = array_at(call.paths, (call.K, call.Lp), np.int32(0))
    p0, p1, p2, p3 = paths[k, t], paths[k, t + 1], paths[k, t + 2], paths[k, t + 3]
    zeros = splat(zero)
    for s in range(0, call.S, LANES):
        y0, y1, y2, y3 = zeros, zeros, zeros, zeros
        for d in range(call.D):
            w = load(weight, (k, d, s))
            y0 += splat(x[b, max(p0, 0), d]) * w
            y1 += splat(x[b, max(p1, 0), d]) * w
            y2 += splat(x[b, max(p2, 0), d]) * w
            y3 += splat(x[b, max(p3, 0), d]) * w
        store(proj, (k, b, t, s), y0 if p0 >= 0 else zeros)
        store(proj, (k, b, t + 1, s), y1 if p1 >= 0 else zeros)
        store(proj, (k, b, t + 2, s), y2 if p2 >= 0 else zeros)
        store(proj, (k, b, t + 3, s), y3 if p3 >= 0 else zeros)


@njit(**COMPILED)
def scan_kernel(call, task, zero):
    """16 channels of a group of an image, from its first token to its last; saves states if there is room for them."""
    blocks = call.D // LANES
    b, k, d = task // blocks // call.K, task // blocks % call.K, task % blocks * LANES
    x = array_at(call.x, (call.B, call.HW, call.D), zero)
    proj = array_at(call.proj, (call.K, call.B, call.Lp, call.S), zero)
    paths = array_at(call.paths, (call.K, call.Lp), np.int32(0))
    y = array_at(call.y, (call.visits, call.B, call.HW, call.D), zero)
    states = array_at(call.states, (call.Lp // CHUNK, call.B, call.K, call.N, call.D), zero)
    bias = load(array_at(call.bias, (call.K, call.D), zero), (k, d))
    skip = load(array_at(call.skip, (call.K, call.D), zero), (k, d))
    A = block_of(array_at(call.A, (call.K, call.N, call.D), zero), k, d)
    dt_proj = block_of(array_at(call.dt_proj, (call.K, call.R, call.D), zero), k, d)
    h = np.zeros_like(A)
    visit = array_at(call.visit_of, (call.K,), np.int32(0))[k]
    C, dt_low = call.Np, 2 * call.Np
    zeros = splat(zero)
    for t in range(call.L):
        if call.save and t % CHUNK == 0:
            for n in range(call.N):
                store(states, (t // CHUNK, b, k, n, d), load(h, (n, 0)))
        p = paths[k, t]
        v = load(x, (b, max(p, 0), d)) if p >= 0 else zeros
        delta = bias
        for r in range(call.R):
            delta += splat(proj[k, b, t, dt_low + r]) * load(dt_proj, (r, 0))
        delta = softplus(delta)
        u = delta * v
        total = v * skip
        for n in range(call.N):
            now = exp2(delta * load(A, (n, 0))) * load(h, (n, 0)) + splat(proj[k, b, t, n]) * u
            store(h, (n, 0), now)
            total += splat(proj[k, b, t, C + n]) * now
        if p >= 0:
            store(y, (visit, b, p, d), total)


@njit(**COMPILED)
def block_of(array, k, d):
    """A copy of `array[k, :, d : d + 16]`, whose rows lie together."""
    block = np.empty((array.shape[1], LANES), array.dtype)
    for n in range(array.shape[1]):
        store(block, (n, 0), load(array, (k, n, d)))
    return block
