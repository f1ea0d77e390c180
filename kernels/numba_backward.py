"""The compiled CPU backward: the scan walked back, and the gradients of the input projections (see numba_forward.py).

With g the gradient of the state, walked from the last token to the first, and q = g exp(delta A) h_before:
`d_u = sum_n g B`, `d_delta = sum_n q A + d_u x`, `dA += q delta`, `dB = sum_d g u`, `dC = sum_d dy h`. Sums over tokens
and images are partial sums of tasks whose number depends on shapes alone, added up in one order by `sum_kernel`.
"""

import numpy as np
from numba import njit

from .numba_forward import CHUNK, TILE
from .numba_vector import COMPILED, LANES, LN2, array_at, exp2, load, row_sums, sigmoid, softplus, splat, store


@njit(**COMPILED)
def scan_backward_kernel(call, task, zero):
    """A few blocks of 16 channels of a group of an image, in chunks of 16 tokens whose states are computed again.

    Writes the map's gradient through u and the skip, that of the projected tokens summed over its channels, and the
    parameters' summed over the tokens: rows N of A, R of dt_proj, bias, skip.
    """
    blocks, N, R = call.D // LANES, call.N, call.R
    b, k, slab = task // call.slabs // call.K, task // call.slabs % call.K, task % call.slabs
    first, last = slab * blocks // call.slabs, (slab + 1) * blocks // call.slabs
    dproj = array_at(call.dproj, (call.slabs, call.K, call.B, call.Lp, call.S), zero)
    # Rows of products whose lanes are still to be summed, for B, C and dt_low of the tokens of a chunk.
    products = np.zeros((CHUNK, call.S, LANES), dproj.dtype)
    carry = np.zeros((blocks, N, LANES), dproj.dtype)
    sums = np.zeros((blocks, N + R + 2, LANES), dproj.dtype)
    scratch = np.empty((9, CHUNK + 1, LANES), dproj.dtype)
    for start in range(call.Lp - CHUNK, -1, -CHUNK):
        tokens = min(CHUNK, call.L - start)
        for block in range(first, last):
            walk_back(call, b, k, start, tokens, block, block == first, carry, sums, products, scratch, zero)
        for t in range(tokens):
            for s in range(0, call.S, LANES):
                store(dproj, (slab, k, b, start + t, s), row_sums(products, (t, s, 0)))
    partial = array_at(call.partial, (call.B, call.K, N + R + 2, call.D), zero)
    for block in range(first, last):
        for n in range(N + R + 2):
            store(partial, (b, k, n, block * LANES), load(sums, (block, n, 0)))


@njit(**COMPILED)
def walk_back(call, b, k, start, tokens, block, is_first, carry, sums, products, scratch, zero):
    """One chunk of one block of channels."""
    d, N, R, Np = block * LANES, call.N, call.R, call.Np
    x = array_at(call.x, (call.B, call.HW, call.D), zero)
    dy = array_at(call.dy, (call.B, call.HW, call.D), zero)
    dx = array_at(call.dx_scan, (call.visits, call.B, call.HW, call.D), zero)
    proj = array_at(call.proj, (call.K, call.B, call.Lp, call.S), zero)
    paths = array_at(call.paths, (call.K, call.Lp), np.int32(0))
    states = array_at(call.states, (call.Lp // CHUNK, call.B, call.K, N, call.D), zero)
    A = array_at(call.A, (call.K, N, call.D), zero)
    dt_proj = array_at(call.dt_proj, (call.K, R, call.D), zero)
    bias = load(array_at(call.bias, (call.K, call.D), zero), (k, d))
    skip = load(array_at(call.skip, (call.K, call.D), zero), (k, d))
    vs, dys, deltas, us, slopes, d_deltas, d_us, decays, hs = (
        scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5], scratch[6], scratch[7], scratch[8],
    )  # fmt: skip
    zeros = splat(zero)
    for t in range(tokens):
        p = paths[k, start + t]
        v = load(x, (b, max(p, 0), d)) if p >= 0 else zeros
        logit = bias
        for r in range(R):
            logit += splat(proj[k, b, start + t, 2 * Np + r]) * load(dt_proj, (k, r, d))
        delta = softplus(logit)
        store(vs, (t, 0), v)
        store(dys, (t, 0), load(dy, (b, max(p, 0), d)) if p >= 0 else zeros)
        store(deltas, (t, 0), delta)
        store(us, (t, 0), delta * v)
        store(slopes, (t, 0), sigmoid(logit))
        store(d_deltas, (t, 0), zeros)
        store(d_us, (t, 0), zeros)
    for n in range(N):
        a = load(A, (k, n, d))
        h = load(states, (start // CHUNK, b, k, n, d))
        for t in range(tokens):
            decay = exp2(load(deltas, (t, 0)) * a)
            store(hs, (t, 0), h)
            store(decays, (t, 0), decay)
            h = decay * h + splat(proj[k, b, start + t, n]) * load(us, (t, 0))
        g = load(carry, (block, n, 0))
        d_a = load(sums, (block, n, 0))
        for t in range(tokens - 1, -1, -1):
            dy_t = load(dys, (t, 0))
            g += splat(proj[k, b, start + t, Np + n]) * dy_t
            d_C, d_B = dy_t * h, g * load(us, (t, 0))
            if not is_first:
                d_C += load(products, (t, Np + n, 0))
                d_B += load(products, (t, n, 0))
            store(products, (t, Np + n, 0), d_C)
            store(products, (t, n, 0), d_B)
            store(d_us, (t, 0), load(d_us, (t, 0)) + g * splat(proj[k, b, start + t, n]))
            g = g * load(decays, (t, 0))
            h = load(hs, (t, 0))
            q = g * h
            d_a += q * load(deltas, (t, 0))
            store(d_deltas, (t, 0), load(d_deltas, (t, 0)) + q * a)
        store(carry, (block, n, 0), g)
        store(sums, (block, n, 0), d_a)
    d_bias, d_skip = load(sums, (block, N + R, 0)), load(sums, (block, N + R + 1, 0))
    visit = array_at(call.visit_of, (call.K,), np.int32(0))[k]
    ln2 = splat(type(zero)(LN2))
    for t in range(tokens):
        d_u, v, dy_t = load(d_us, (t, 0)), load(vs, (t, 0)), load(dys, (t, 0))
        d_logit = (load(d_deltas, (t, 0)) * ln2 + d_u * v) * load(slopes, (t, 0))
        for r in range(R):
            product = d_logit * load(dt_proj, (k, r, d))
            if not is_first:
                product += load(products, (t, 2 * Np + r, 0))
            store(products, (t, 2 * Np + r, 0), product)
            weight = load(sums, (block, N + r, 0)) + d_logit * splat(proj[k, b, start + t, 2 * Np + r])
            store(sums, (block, N + r, 0), weight)
        d_bias += d_logit
        d_skip += dy_t * v
        p = paths[k, start + t]
        if p >= 0:
            store(dx, (visit, b, p, d), dy_t * skip + d_u * load(deltas, (t, 0)))
    store(sums, (block, N + R, 0), d_bias)
    store(sums, (block, N + R + 1, 0), d_skip)


@njit(**COMPILED)
def input_gradient_kernel(call, task, zero):
    """Four tokens of a group: add what the map's gradient gets through their projections, summed over the slabs."""
    tiles = call.Lp // TILE
    k, b, t = task // (tiles * call.B), task // tiles % call.B, task % tiles * TILE
    weight = array_at(call.x_proj_rows, (call.K, call.S, call.D), zero)
    dproj = array_at(call.dproj, (call.slabs, call.K, call.B, call.Lp, call.S), zero)
    dx = array_at(call.dx_scan, (call.visits, call.B, call.HW, call.D), zero)
    paths = array_at(call.paths, (call.K, call.Lp), np.int32(0))
    zeros = splat(zero)
    for i in range(t, min(t + TILE, call.L)):
        for s in range(0, call.S, LANES):
            total = load(dproj, (0, k, b, i, s))
            for slab in range(1, call.slabs):
                total += load(dproj, (slab, k, b, i, s))
            store(dproj, (0, k, b, i, s), total)
    for i in range(max(t, min(t + TILE, call.L)), t + TILE):
        for s in range(0, call.S, LANES):
            store(dproj, (0, k, b, i, s), zeros)
    visit = array_at(call.visit_of, (call.K,), np.int32(0))[k]
    p0, p1, p2, p3 = paths[k, t], paths[k, t + 1], paths[k, t + 2], paths[k, t + 3]
    for d in range(0, call.D, LANES):
        y0, y1, y2, y3 = zeros, zeros, zeros, zeros
        for s in range(2 * call.Np + call.R):
            w = load(weight, (k, s, d))
            y0 += splat(dproj[0, k, b, t, s]) * w
            y1 += splat(dproj[0, k, b, t + 1, s]) * w
            y2 += splat(dproj[0, k, b, t + 2, s]) * w
            y3 += splat(dproj[0, k, b, t + 3, s]) * w
        if p0 >= 0:
            store(dx, (visit, b, p0, d), load(dx, (visit, b, p0, d)) + y0)
        if p1 >= 0:
            store(dx, (visit, b, p1, d), load(dx, (visit, b, p1, d)) + y1)
        if p2 >= 0:
            store(dx, (visit, b, p2, d), load(dx, (visit, b, p2, d)) + y2)
        if p3 >= 0:
            store(dx, (visit, b, p3, d), load(dx, (visit, b, p3, d)) + y3)


@njit(**COMPILED)
def weight_gradient_kernel(call, task, zero):
    """Gradient of x_proj summed over a piece of the tokens of a group (of all images, one after the other)."""
    k, piece = task // call.pieces, task % call.pieces
    x = array_at(call.x, (call.B, call.HW, call.D), zero)
    dproj = array_at(call.dproj, (call.slabs, call.K, call.B * call.Lp, call.S), zero)
    partial = array_at(call.weight_partial, (call.pieces, call.K, call.S, call.D), zero)
    paths = array_at(call.paths, (call.K, call.Lp), np.int32(0))
    zeros = splat(zero)
    for s in range(call.S):
        for d in range(0, call.D, LANES):
            store(partial, (piece, k, s, d), zeros)
    for m in range(piece * call.piece, min((piece + 1) * call.piece, call.B * call.Lp), TILE):
        b, t = m // call.Lp, m % call.Lp
        p0, p1, p2, p3 = paths[k, t], paths[k, t + 1], paths[k, t + 2], paths[k, t + 3]
        for d in range(0, call.D, LANES):
            x0 = load(x, (b, max(p0, 0), d)) if p0 >= 0 else zeros
            x1 = load(x, (b, max(p1, 0), d)) if p1 >= 0 else zeros
            x2 = load(x, (b, max(p2, 0), d)) if p2 >= 0 else zeros
            x3 = load(x, (b, max(p3, 0), d)) if p3 >= 0 else zeros
            for s in range(2 * call.Np + call.R):
                total = load(partial, (piece, k, s, d))
                total += splat(dproj[0, k, m, s]) * x0
                total += splat(dproj[0, k, m + 1, s]) * x1
                total += splat(dproj[0, k, m + 2, s]) * x2
                total += splat(dproj[0, k, m + 3, s]) * x3
                store(partial, (piece, k, s, d), total)


@njit(**COMPILED)
def sum_kernel(call, task, zero):
    """16 columns of two matrices of partial sums, added up row by row into the first row."""
    columns, weight_columns = call.K * (call.N + call.R + 2) * call.D, call.K * call.S * call.D
    i = task * LANES
    if i < columns:
        add_rows(array_at(call.partial, (call.B, columns), zero), i)
    else:
        add_rows(array_at(call.weight_partial, (call.pieces, weight_columns), zero), i - columns)


@njit(**COMPILED)
def add_rows(rows, i):
    """Sum of the rows' elements i to i + 15, into the first row."""
    total = load(rows, (0, i))
    for row in range(1, rows.shape[0]):
        total += load(rows, (row, i))
    store(rows, (0, i), total)
