"""The compiled CPU kernels of what is around a scan, for inference: depthwise convolution, norms, gates of a block.

Kernels are as in numba_forward.py, and so are their tasks: what one is depends on shapes alone. Maps are
`[B, H, W, D]`, D a multiple of 16; where a map is a slice of a wider one, `stride` numbers lie from pixel to pixel.
"""

import math

import numpy as np
from numba import njit

from .numba_vector import COMPILED, LANES, array_at, gelu, lane_sum, load, relu, sigmoid, splat, store

NONE, RELU, SILU, GELU = range(4)
ROWS = 32  # pixels of a task of the kernels that go through a map pixel by pixel
GATES = 64  # channels of a task of the kernel that makes gates and multiplies by them


@njit(**COMPILED)
def depthwise_kernel(call, task, zero):
    """One row of a map: 3x3 convolution of every channel by itself, bias, BatchNorm's four tensors where there are
    such, activation. `weight` is `[9, D]`."""
    H, W, D, stride, active = call.H, call.W, call.D, call.stride, call.activation
    b, h = task // H, task % H
    x = array_at(call.x, (call.B * H * W * stride,), zero)
    out = array_at(call.y, (call.B, H, W, D), zero)
    weight = array_at(call.weight, (9, D), zero)
    scale, shift = affine_of_norm(call, D, zero)
    first, last = max(h - 1, 0), min(h + 2, H)
    for w in range(0, W, 4):
        if w > 0 and w + 4 < W:
            for d in range(0, D, LANES):
                y0 = y1 = y2 = y3 = splat(zero)
                for i in range(first, last):
                    tap = 3 * (i - h + 1)
                    left, middle, right = load(weight, (tap, d)), load(weight, (tap + 1, d)), load(weight, (tap + 2, d))
                    at = ((b * H + i) * W + w - 1) * stride + d
                    y0 += left * load(x, (at,))
                    v = load(x, (at + stride,))
                    y0 += middle * v
                    y1 += left * v
                    v = load(x, (at + 2 * stride,))
                    y0 += right * v
                    y1 += middle * v
                    y2 += left * v
                    v = load(x, (at + 3 * stride,))
                    y1 += right * v
                    y2 += middle * v
                    y3 += left * v
                    v = load(x, (at + 4 * stride,))
                    y2 += right * v
                    y3 += middle * v
                    y3 += right * load(x, (at + 5 * stride,))
                s, t = load(scale, (d,)), load(shift, (d,))
                store(out, (b, h, w, d), activate(y0 * s + t, active))
                store(out, (b, h, w + 1, d), activate(y1 * s + t, active))
                store(out, (b, h, w + 2, d), activate(y2 * s + t, active))
                store(out, (b, h, w + 3, d), activate(y3 * s + t, active))
        else:
            for j in range(w, min(w + 4, W)):
                for d in range(0, D, LANES):
                    y = splat(zero)
                    for i in range(first, last):
                        for k in range(max(j - 1, 0), min(j + 2, W)):
                            v = load(x, (((b * H + i) * W + k) * stride + d,))
                            y += load(weight, (3 * (i - h + 1) + k - j + 1, d)) * v
                    store(out, (b, h, j, d), activate(y * load(scale, (d,)) + load(shift, (d,)), active))


@njit(**COMPILED)
def affine_of_norm(call, D, zero):
    """What each channel is multiplied by, and what is added then: a convolution's bias and BatchNorm's, if any."""
    scale, shift = np.ones(D, np.dtype(type(zero))), np.zeros(D, np.dtype(type(zero)))
    if call.bias:
        shift[:] = array_at(call.bias, (D,), zero)
    if call.norm_var:
        mean, var = array_at(call.norm_mean, (D,), zero), array_at(call.norm_var, (D,), zero)
        weight, bias = array_at(call.norm_weight, (D,), zero), array_at(call.norm_bias, (D,), zero)
        for d in range(D):
            scale[d] = weight[d] / math.sqrt(var[d] + type(zero)(call.eps))
            shift[d] = bias[d] + (shift[d] - mean[d]) * scale[d]
    return scale, shift


@njit(**COMPILED)
def activate(v, activation):
    """An activation of a vector."""
    if activation == SILU:
        return v * sigmoid(v)
    if activation == GELU:
        return gelu(v)
    if activation == RELU:
        return relu(v)
    return v


@njit(**COMPILED)
def moments(row, r, D, eps, zero):
    """Mean of row r, and the inverse of its deviation."""
    total = splat(zero)
    for d in range(0, D, LANES):
        total += load(row, (r, d))
    mean = lane_sum(total) / type(zero)(D)
    squares = splat(zero)
    for d in range(0, D, LANES):
        v = load(row, (r, d)) - splat(mean)
        squares += v * v
    return mean, type(zero)(1 / math.sqrt(lane_sum(squares) / type(zero)(D) + eps))


@njit(**COMPILED)
def batch_norm_kernel(call, task, zero):
    """A few pixels: every channel times a number, plus another (BatchNorm in evaluation), activation."""
    D, active = call.D, call.activation
    x, out = array_at(call.x, (call.HW, D), zero), array_at(call.y, (call.HW, D), zero)
    scale, shift = affine_of_norm(call, D, zero)
    for r in range(task * ROWS, min((task + 1) * ROWS, call.HW)):
        for d in range(0, D, LANES):
            store(out, (r, d), activate(load(x, (r, d)) * load(scale, (d,)) + load(shift, (d,)), active))


@njit(**COMPILED)
def norm_kernel(call, task, zero):
    """A few pixels: LayerNorm over the channels, times SiLU of a gate where there is one."""
    D, stride = call.D, call.stride
    x, out = array_at(call.x, (call.HW, D), zero), array_at(call.y, (call.HW, D), zero)
    gate = array_at(call.gate, (call.HW * stride,), zero)
    weight, bias = array_at(call.weight, (D,), zero), array_at(call.bias, (D,), zero)
    for r in range(task * ROWS, min((task + 1) * ROWS, call.HW)):
        mean, scale = moments(x, r, D, call.eps, zero)
        for d in range(0, D, LANES):
            v = (load(x, (r, d)) - splat(mean)) * splat(scale) * load(weight, (d,)) + load(bias, (d,))
            if stride > 0:
                z = load(gate, (r * stride + d,))
                v = v * (z * sigmoid(z))
            store(out, (r, d), v)


@njit(**COMPILED)
def squeeze_kernel(call, task, zero):
    """A few pixels of one of two maps of an image: the sum of their normalised channels."""
    D, HW, pieces = call.D, call.HW, call.pieces
    b, m, piece = task // pieces // 2, task // pieces % 2, task % pieces
    branch = array_at(call.v if m else call.u, (call.B * HW, D), zero)
    partial = array_at(call.partial, (call.B, 2, pieces, D), zero)
    for d in range(0, D, LANES):
        store(partial, (b, m, piece, d), splat(zero))
    for r in range(b * HW + piece * ROWS, b * HW + min((piece + 1) * ROWS, HW)):
        mean, scale = moments(branch, r, D, call.eps, zero)
        for d in range(0, D, LANES):
            v = (load(branch, (r, d)) - splat(mean)) * splat(scale)
            store(partial, (b, m, piece, d), load(partial, (b, m, piece, d)) + v)


@njit(**COMPILED)
def dot(matrix, row, vector, n, zero):
    """A row of a matrix times a vector, n numbers of each."""
    total, whole = splat(zero), n // LANES * LANES
    for k in range(0, whole, LANES):
        total += load(matrix, (row, k)) * load(vector, (k,))
    value = lane_sum(total)
    for k in range(whole, n):
        value += matrix[row, k] * vector[k]
    return value


@njit(**COMPILED)
def mean_of_pieces(call, m, maps, zero):
    """The mean of each channel of one of some maps, from the sums of its pieces, `partial` `[maps, pieces, D]`."""
    D, pieces = call.D, call.pieces
    partial, mean = array_at(call.partial, (maps, pieces, D), zero), np.empty(D, np.dtype(type(zero)))
    for d in range(0, D, LANES):
        total = load(partial, (m, 0, d))
        for piece in range(1, pieces):
            total += load(partial, (m, piece, d))
        store(mean, (d,), total * splat(type(zero)(1) / type(zero)(call.HW)))
    return mean


@njit(**COMPILED)
def excite_kernel(call, task, zero):
    """The gate of one of two maps of an image, `sigmoid(W2 gelu(W1 mean + b1) + b2)`; `w2` is `[S, D]`."""
    D, S = call.D, call.S
    weight, bias = array_at(call.weight, (D,), zero), array_at(call.bias, (D,), zero)
    w1, b1 = array_at(call.w1, (S, D), zero), array_at(call.b1, (S,), zero)
    w2, b2 = array_at(call.w2, (S, D), zero), array_at(call.b2, (D,), zero)
    gates, means = array_at(call.gates, (2 * call.B, D), zero), array_at(call.mean, (2 * call.B, D), zero)
    squeezed = mean_of_pieces(call, task, 2 * call.B, zero)
    for d in range(0, D, LANES):
        mean = load(squeezed, (d,))
        store(means, (task, d), mean)
        store(squeezed, (d,), mean * load(weight, (d,)) + load(bias, (d,)))
    hidden = np.zeros(-(-S // LANES) * LANES, b1.dtype)
    for s in range(S):
        hidden[s] = dot(w1, s, squeezed, D, zero) + b1[s]
    for s in range(0, S, LANES):
        store(hidden, (s,), gelu(load(hidden, (s,))))
    for d in range(0, D, LANES):
        total = load(b2, (d,))
        for s in range(S):
            total += splat(hidden[s]) * load(w2, (s, d))
        store(gates, (task, d), sigmoid(total))


@njit(**COMPILED)
def gated_sum_kernel(call, task, zero):
    """A few pixels: a map plus two maps times their gates."""
    D, HW, pieces = call.D, call.HW, call.pieces
    b, piece = task // pieces, task % pieces
    x, out = array_at(call.x, (call.B * HW, D), zero), array_at(call.y, (call.B * HW, D), zero)
    u, v = array_at(call.u, (call.B * HW, D), zero), array_at(call.v, (call.B * HW, D), zero)
    gates = array_at(call.gates, (call.B, 2, D), zero)
    for r in range(b * HW + piece * ROWS, b * HW + min((piece + 1) * ROWS, HW)):
        for d in range(0, D, LANES):
            change = load(u, (r, d)) * load(gates, (b, 0, d)) + load(v, (r, d)) * load(gates, (b, 1, d))
            store(out, (r, d), load(x, (r, d)) + change)


@njit(**COMPILED)
def channel_sums_kernel(call, task, zero):
    """A few pixels of an image: the sum of each channel."""
    D, HW, pieces = call.D, call.HW, call.pieces
    b, piece = task // pieces, task % pieces
    x, partial = array_at(call.x, (call.B * HW, D), zero), array_at(call.partial, (call.B, pieces, D), zero)
    first, last = piece * ROWS, min((piece + 1) * ROWS, HW)
    for d in range(0, D, LANES):
        total = splat(zero)
        for r in range(b * HW + first, b * HW + last):
            total += load(x, (r, d))
        store(partial, (b, piece, d), total)


@njit(**COMPILED)
def hidden_kernel(call, task, zero):
    """Up to 16 of an image's squeezed channels, `relu(W1 mean + b1)`."""
    D, S = call.D, call.S
    blocks = -(-S // LANES)
    b, first = task // blocks, task % blocks * LANES
    w1, b1 = array_at(call.w1, (S, D), zero), array_at(call.b1, (S,), zero)
    hidden, mean = array_at(call.mean, (call.B, S), zero), mean_of_pieces(call, b, call.B, zero)
    for s in range(first, min(first + LANES, S)):
        value = dot(w1, s, mean, D, zero) + b1[s]
        hidden[b, s] = zero if value < zero else value


@njit(**COMPILED)
def excited_kernel(call, task, zero):
    """A few channels of an image: times their gate, `sigmoid(W2 hidden + b2)`."""
    D, S, HW = call.D, call.S, call.HW
    blocks = -(-D // GATES)
    b, first = task // blocks, task % blocks * GATES
    last = min(first + GATES, D)
    x, out = array_at(call.x, (call.B * HW, D), zero), array_at(call.y, (call.B * HW, D), zero)
    w2, b2 = array_at(call.w2, (D, S), zero), array_at(call.b2, (D,), zero)
    hidden, gates = array_at(call.mean, (call.B, S), zero), np.empty(GATES, b2.dtype)
    for d in range(first, last):
        gates[d - first] = dot(w2, d, hidden[b], S, zero) + b2[d]
    for d in range(0, last - first, LANES):
        store(gates, (d,), sigmoid(load(gates, (d,))))
    for r in range(b * HW, (b + 1) * HW):
        for d in range(0, last - first, LANES):
            store(out, (r, first + d), load(x, (r, first + d)) * load(gates, (d,)))
