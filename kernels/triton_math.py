"""What the kernels share: step size, packed pairs, sums across the lanes of a warp, and the device of a launch."""

# ruff: noqa: RUF005 (Triton joins tuples with +)
# mypy: disable-error-code="assignment"

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))
LN2: tl.constexpr = tl.constexpr(math.log(2))
CHECKPOINT = 16  # tokens between saved states
T: tl.constexpr = tl.constexpr(CHECKPOINT)
GROUP_TOKENS = 4  # tokens whose rows of projections the forward loads at once
GROUP: tl.constexpr = tl.constexpr(GROUP_TOKENS)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # of maps
BLOCK = 32  # channels of a scan's program: one a lane of its only warp
LANES: tl.constexpr = tl.constexpr(BLOCK)

# Sizes that change from batch to batch. Triton would compile a kernel for those divisible by 16 and one for those equal
# to 1, again and again in the middle of a multi-scale training, and gain nothing.
SIZES = ("B", "H", "W", "HW", "L", "NC", "segments", "tokens", "rows", "chunks")


def on_device(device: torch.device) -> AbstractContextManager:
    """Launch on this device, whichever is current; nothing to do for CPU tensors in the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _log2(v, NVIDIA: tl.constexpr):
    # tl.log2 is a long polynomial of the device library; the hardware has one instruction for it.
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(v)


@triton.jit
def softplus(v, NVIDIA: tl.constexpr):
    """log(1 + exp(v)); where the hardware's logarithm of a number near 1 would lose digits, the polynomial of least
    relative error (1.3e-7)."""
    e = tl.exp2(v * LOG2E)
    small = e * (0.99999987 - e * (0.4999577 - e * (0.33117982 - 0.21422405 * e)))
    return tl.where(v > 20.0, v, tl.where(e < 0.1, small, LN2 * _log2(1.0 + e, NVIDIA)))


@triton.jit
def softplus_slope(delta):
    """d softplus(v) / dv = sigmoid(v) = 1 - exp(-delta) of delta = softplus(v); where that would cancel, the polynomial
    of least relative error (1.0e-7)."""
    small = delta * (0.9999999 - delta * (0.4999841 - delta * (0.16627033 - 0.03846861 * delta)))
    return tl.where(delta < 0.2, small, 1.0 - tl.exp2(-delta * LOG2E))


@triton.jit
def normal_cdf(v):
    """(1 + erf(v / sqrt(2))) / 2, for GELU, within 1e-7 (Abramowitz and Stegun, 7.1.26); the library's erf branches."""
    z = tl.abs(v) * 0.70710678118654752
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * tl.exp2(-z * z * LOG2E)
    return tl.where(v < 0.0, tail, 1.0 - tail)


@triton.jit
def load_rounded(p, mask, DTYPE: tl.constexpr):
    """A projection weight in float32, rounded to the type the projections run in."""
    return tl.load(p, mask=mask, other=0.0).to(DTYPE).to(tl.float32)


@triton.jit
def low_float(pair):
    """First float32 of two packed in an int64 (B of a (B, C) pair)."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def high_float(pair):
    """Second float32 of two packed in an int64 (C of a (B, C) pair)."""
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def unpack(parts, n: tl.constexpr):
    """n numbers, a power of two, as a tuple of scalars in order: part i of the m tensors has numbers i, i + m, ...

    Splits off the last bit each time, which leaves loads as wide as they are.
    """
    if len(parts) < n:
        even, odd = (), ()
        for i in tl.static_range(len(parts)):
            if len(parts) * 2 < n:
                pair = tl.split(tl.reshape(parts[i], [n // (2 * len(parts)), 2]))
            else:
                pair = tl.split(parts[i])
            even = even + (pair[0],)
            odd = odd + (pair[1],)
        out = unpack(even + odd, n)
    else:
        out = parts
    return out


@triton.jit
def swap(v, M: tl.constexpr):
    """The number of lane ^ M, of 32 lanes: one SHFL.BFLY, which unlike one by index needs no register for the lane."""
    bits = tl.reshape(v.to(tl.int32, bitcast=True), [LANES // (2 * M), 2, M])
    both = tl.xor_sum(bits, 1, keep_dims=True)
    return tl.reshape(both ^ bits, [LANES]).to(tl.float32, bitcast=True)


@triton.jit
def fold(values, lane, M: tl.constexpr):
    """Halve a tuple of 2K vectors of 32 lanes: lanes with bit M in their number sum the upper K, the rest the lower.

    After folding 2^m vectors m times with M = 16, 8, ... the leading m bits of a lane's number say whose sum it has.
    A fold costs one shuffle and three instructions a vector, a plain sum of each vector five shuffles.
    """
    K: tl.constexpr = len(values) // 2
    upper = (lane & M) != 0
    out = ()
    for i in tl.static_range(K):
        keep = tl.where(upper, values[i + K], values[i])
        send = tl.where(upper, values[i], values[i + K])
        out = out + (keep + swap(send, M),)
    return out


@triton.jit
def lane_selectors(lane):
    """Eight constants for `add_lanes`: number i is 1 in lanes 4i to 4i + 3 and 0 in the others."""
    selectors = ()
    for i in tl.static_range(8):
        selectors = selectors + (tl.where((lane >> 2) == i, 1.0, 0.0),)
    return selectors


@triton.jit
def add_lanes(even, odd, select_even, select_odd, sums):
    """Add two pairs of vectors of 32 lanes to `sums` on NVIDIA's tensor cores, four lanes at a time.

    The vectors are the quarters of a 16 x 8 matrix whose rows j and j + 8 hold lanes 4j to 4j + 3: even[0] top left,
    even[1] below it, odd[0] and odd[1] to the right. The selectors with numbers m and n are the halves of an 8 x 8
    matrix that puts the sums over four lanes of `even` into column m and of `odd` into column n of the 16 x 8 sums.
    Of these, lane l holds row l / 4, columns 2 (l % 4) and the one after, in registers 0 and 1, and the same of row
    l / 4 + 8 in registers 2 and 3. Vectors are cut to tf32 (10 bits behind the point), sums are float32.
    """
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [even[0], even[1], odd[0], odd[1], select_even, select_odd, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
